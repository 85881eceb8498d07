"""Checkpoints: files that all ranks write together, and that any other run reads."""

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.load import Wanted, load
from partita.checkpoint.save import About, save

__all__ = ["About", "CheckpointError", "Wanted", "load", "save"]
