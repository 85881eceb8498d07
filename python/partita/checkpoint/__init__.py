"""Checkpoints: files that all ranks write together, and that any other run reads."""

from partita.checkpoint.deepspeed import DeepSpeedImport
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.export import export
from partita.checkpoint.folder import Found, checkpoints, find, latest_tag, prune
from partita.checkpoint.load import Wanted, load
from partita.checkpoint.save import About, save
from partita.checkpoint.verify import Verified, verify

__all__ = [
    "About",
    "CheckpointError",
    "DeepSpeedImport",
    "Found",
    "Verified",
    "Wanted",
    "checkpoints",
    "export",
    "find",
    "latest_tag",
    "load",
    "prune",
    "save",
    "verify",
]
