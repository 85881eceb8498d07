"""Checkpoints: files that all ranks write together, and that any other run reads."""

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.export import export
from partita.checkpoint.folder import Found, checkpoints, find, latest_tag, prune
from partita.checkpoint.load import Wanted, load
from partita.checkpoint.model_files import save_model_files
from partita.checkpoint.model_weights import ModelWeights
from partita.checkpoint.newest import load_sound, newest, newest_tag, prepare, verify_together
from partita.checkpoint.save import About, Save
from partita.checkpoint.transfer import HostRoom
from partita.checkpoint.verify import Verified, verify

__all__ = [
    "About",
    "CheckpointError",
    "Found",
    "HostRoom",
    "ModelWeights",
    "Save",
    "Verified",
    "Wanted",
    "checkpoints",
    "export",
    "find",
    "latest_tag",
    "load",
    "load_sound",
    "newest",
    "newest_tag",
    "prepare",
    "prune",
    "save_model_files",
    "verify",
    "verify_together",
]
