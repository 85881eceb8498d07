"""Checkpoints: files that all ranks write together, and that any other run reads."""

from partita.checkpoint.audit_check import Checked, check_audit
from partita.checkpoint.deepspeed import DeepSpeedImport
from partita.checkpoint.disk import GROUP, OWNER
from partita.checkpoint.encrypt import encrypt
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.export import export
from partita.checkpoint.folder import Found, checkpoints, find, latest_tag, prune, require_folder
from partita.checkpoint.load import Wanted, load
from partita.checkpoint.model_files import save_model_files
from partita.checkpoint.model_weights import ModelWeights
from partita.checkpoint.newest import load_sound, newest, newest_tag, prepare, verify_together
from partita.checkpoint.protection import Protection, event_of, facts_of, protection_for
from partita.checkpoint.rekey import rekey
from partita.checkpoint.save import About, Save
from partita.checkpoint.transfer import HostRoom
from partita.checkpoint.user_key import KeySource, new_key
from partita.checkpoint.verify import Verified, verify

__all__ = [
    "GROUP",
    "OWNER",
    "About",
    "Checked",
    "CheckpointError",
    "DeepSpeedImport",
    "Found",
    "HostRoom",
    "KeySource",
    "ModelWeights",
    "Protection",
    "Save",
    "Verified",
    "Wanted",
    "check_audit",
    "checkpoints",
    "encrypt",
    "event_of",
    "export",
    "facts_of",
    "find",
    "latest_tag",
    "load",
    "load_sound",
    "new_key",
    "newest",
    "newest_tag",
    "prepare",
    "protection_for",
    "prune",
    "rekey",
    "require_folder",
    "save_model_files",
    "verify",
    "verify_together",
]
