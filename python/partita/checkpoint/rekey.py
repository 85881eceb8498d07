"""Another user key for checkpoints that there are: their data keys are wrapped anew, and no data is written."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from partita.checkpoint import audit
from partita.checkpoint.disk import OWNER, Access, naming, sync_folder, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import Found
from partita.checkpoint.manifest import MANIFEST, Encryption, manifest_text
from partita.checkpoint.protection import opened_manifest, sealed_manifest
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.user_key import UserKey


def rekey(directory: Path, found: Sequence[Found], old: UserKey, new: UserKey, log: bool) -> Iterator[Path]:
    """Gives checkpoints another user key; gives the path of each that has it now. The old key does not open them then.

    A call that was interrupted is repeated: what has the new key already stays as it is. Before anything changes, all
    that is to change has been opened.

    Args:
        found: in `directory`. What is not encrypted is left out.
        log: the audit log gets the new key too.

    Raises:
        CheckpointError: the old key does not open one of them, or the log; nothing has changed.
        OSError: a manifest cannot be written.
    """
    encrypted = [(one, one.manifest.encryption) for one in found if one.manifest.encryption is not None]
    has_log = audit.has_log(directory)
    if not encrypted and not has_log:
        raise CheckpointError(f"'{directory}' has no encrypted checkpoint")
    left = [(one, encryption, cipher) for one, encryption in encrypted if (cipher := _open(one, encryption, old, new))]
    log_key = _key_of_log(directory, old, new) if has_log else None
    for one, encryption, cipher in left:
        _replace(one, encryption, cipher, new)
        if log_key is not None:
            audit.append(directory, log_key, audit.Event("rekeyed", one.tag, encryption.id), _access_of(directory))
        yield one.path
    if log and log_key is old:
        audit.rewrap(directory, old, new, _access_of(directory))


def _open(one: Found, encryption: Encryption, old: UserKey, new: UserKey) -> Cipher | None:
    """What opens a checkpoint; None: it has the new key."""
    with suppress(CheckpointError):
        opened_manifest(one, encryption, new)
        return None
    return opened_manifest(one, encryption, old)


def _key_of_log(directory: Path, old: UserKey, new: UserKey) -> UserKey:
    with suppress(CheckpointError):
        audit.read_key(directory, new)
        return new
    audit.read_key(directory, old)
    return old


def _replace(one: Found, encryption: Encryption, cipher: Cipher, new: UserKey) -> None:
    """A new manifest takes the place of the old one, at once and durably."""
    manifest = sealed_manifest(one.manifest, cipher, cipher.wrapped_for(new), encryption.audit)
    path = one.path / MANIFEST
    unfinished = one.path / f".{MANIFEST}.{secrets.token_hex(4)}"
    with naming(path):
        mode = stat.S_IMODE(path.lstat().st_mode)
        write_durably(unfinished, manifest_text(manifest).encode(), mode)
        try:
            os.rename(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        sync_folder(one.path)


def _access_of(directory: Path) -> Access:
    """Who may read the log, as it is."""
    with suppress(OSError):
        return Access(stat.S_IMODE((directory / audit.LOG).stat().st_mode), OWNER.folder)
    return OWNER
