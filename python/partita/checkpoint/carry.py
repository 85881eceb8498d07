"""Files that a program has put beside those of a checkpoint, such as a tokenizer's: the next checkpoint has them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from partita.checkpoint.disk import is_at, kind_of, naming
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import manifest_in, open_in, opened_folder, place_of
from partita.checkpoint.manifest import MANIFEST

logger = logging.getLogger("partita")

# Names of a checkpoint's own files, for folders whose manifest cannot be read.
_OWN = re.compile(r"(model|optimizer)(-.*)?\.safetensors(\.index\.json)?|state\.json")
_TRIES = 20


def carry_over(directory: Path, tag: str, new: Path) -> None:
    """Gives a new checkpoint what is in the folder of the old one and in no manifest: hard links, or else copies.

    Hidden files are left out. What is no regular file, or can be neither linked nor copied, is left out with a warning
    in the log. The names in `new` are not synced yet when this returns.

    Args:
        directory: the folder of checkpoints.
        tag: of the old one. Another program may have set it aside for the moment, or may replace it meanwhile.
        new: the folder of the new one.
    """
    for _ in range(_TRIES):
        old = place_of(directory, tag)
        try:
            with opened_folder(old) as fd:
                names = _foreign(fd, old, new)
                if is_at(fd, old):  # else it may be half removed, its manifest first
                    _carry(fd, old, new, names)
                if is_at(fd, old):
                    return
        except CheckpointError:
            if kind_of(place_of(directory, tag)) is None:  # there is none
                return


def _carry(old_fd: int, old: Path, new: Path, names: list[str]) -> None:
    for name in names:
        try:
            mode = os.stat(name, dir_fd=old_fd, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise CheckpointError("it is no regular file")
            _link_or_copy(old_fd, old / name, new / name)
        except FileNotFoundError:
            continue  # removed just now
        except (CheckpointError, OSError) as error:
            logger.warning("'%s' is not in the new checkpoint and is removed with the old one: %s", old / name, error)


def _foreign(old_fd: int, old: Path, new: Path) -> list[str]:
    try:
        own = manifest_in(old_fd, old).files.keys()
    except CheckpointError:
        own = None
    taken = {MANIFEST, *os.listdir(new)}
    names = [name for name in sorted(os.listdir(old_fd)) if name not in taken and not name.startswith(".")]
    return [name for name in names if not (_OWN.fullmatch(name) if own is None else name in own)]


def _link_or_copy(old_fd: int, old: Path, new: Path) -> None:
    """A link is not followed, also if it took the name just now."""
    try:
        os.link(old.name, new, src_dir_fd=old_fd, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # the file system has none, too many, or not of files of others
        with os.fdopen(open_in(old_fd, old), "rb") as source:
            _copy(source.fileno(), new)


def _copy(source: int, path: Path) -> None:
    """The copy's bytes are on the disk when this returns. A copy that is not whole is removed."""
    mode = stat.S_IMODE(os.fstat(source).st_mode)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with naming(path), os.fdopen(fd, "wb") as target, os.fdopen(os.dup(source), "rb") as file:
            shutil.copyfileobj(file, target)
            target.flush()
            os.fsync(target.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
