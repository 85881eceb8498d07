"""Checkpoints: folders of safetensors files and JSON that any number of ranks writes and reads."""
