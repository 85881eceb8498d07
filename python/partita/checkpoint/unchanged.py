"""Files of which an earlier checkpoint has the same bytes: they are linked, and not written again.

Frozen parameters have files of their own for that. Such a file gets a second name if the digests of what the ranks have
now are those in the earlier manifest. So a base model below adapters takes its room on the disk once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import find
from partita.checkpoint.layout import FileLayout
from partita.checkpoint.manifest import FileRecord
from partita.checkpoint.transfer import chunks_of, digest_of, digest_text
from partita.device import HOST


class Earlier(BaseModel):
    """Files that a new checkpoint may have from an earlier one.

    folder: of the earlier one. files: by name, as its manifest has them.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    folder: str = ""
    files: dict[str, FileRecord] = {}


def earlier_files(directory: Path, files: Iterable[FileLayout], earlier: Path | None = None) -> Earlier:
    """Which of these files an earlier checkpoint has with the same name, size and header.

    Args:
        earlier: that checkpoint; None: the latest one in the directory.
    """
    try:
        found = find(directory, None) if earlier is None else find(earlier.parent, earlier.name)
    except (CheckpointError, OSError):
        return Earlier()
    same = {}
    for file in files:
        record = found.manifest.files.get(file.name)
        if record is not None and record.size == file.size and record.chunks[0][1] == digest_text(file.header):
            same[file.name] = record
    return Earlier(folder=str(found.path), files=same)


def has_same_bytes(record: FileRecord, own: Iterable[tuple[int, Tensor]], chunk_bytes: int) -> bool:
    """Whether a file has all that this rank would write, by the digests of the same chunks.

    Args:
        own: (offset in the file, flat values).
    """
    ends = accumulate(length for length, _ in record.chunks)
    digests = {end - length: (length, digest) for end, (length, digest) in zip(ends, record.chunks, strict=True)}
    return all(
        digests.get(offset) == (part.nbytes, digest_of(part.to(HOST)))
        for begin, values in own
        for offset, part in chunks_of(begin, values, chunk_bytes)
    )


def try_link(source: Path, target: Path, size: int, mode: int) -> bool:
    """Gives a regular file of this size and mode a second name, if the file system can; else nothing is left."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    status = target.lstat()
    if stat.S_ISREG(status.st_mode) and (status.st_size, stat.S_IMODE(status.st_mode)) == (size, mode):
        return True
    os.unlink(target)
    return False
