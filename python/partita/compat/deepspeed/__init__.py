"""The public names of DeepSpeed, over Partita."""
