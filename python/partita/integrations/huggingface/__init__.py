"""Accelerate and Trainer over Partita."""
