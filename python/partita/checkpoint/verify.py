"""Whether every byte of a checkpoint is the one that was saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import open_file
from partita.checkpoint.manifest import FileRecord, Manifest
from partita.checkpoint.reads import Reads
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.stored import chunk_of


@dataclass(frozen=True)
class Verified:
    """A chunk that was looked at. problem: what is wrong with it, or with its file; empty: nothing."""

    file: str
    nbytes: int
    problem: str = ""


def verify(folder: Path, manifest: Manifest, cipher: Cipher | None = None) -> Iterator[Verified]:
    """Reads all files of a checkpoint and compares each chunk with its digest. Goes on after a problem.

    Args:
        cipher: of an encrypted checkpoint, whose chunks are decrypted too: who has changed them may have changed the
            digests. None: only damage is found.
    """
    with Reads() as reads:
        for name, record in manifest.files.items():
            try:
                fd = open_file(folder, name)
            except (OSError, CheckpointError) as error:
                yield Verified(name, record.size, str(error))
                continue
            try:
                yield from _verify_file(folder / name, fd, record, reads, cipher)
            finally:
                os.close(fd)


def _verify_file(path: Path, fd: int, record: FileRecord, reads: Reads, cipher: Cipher | None) -> Iterator[Verified]:
    size = os.fstat(fd).st_size
    if size != record.size:
        yield Verified(path.name, 0, f"'{path}' has {size:,} bytes, and had {record.size:,} when it was saved")
        return
    begin = 0
    for number, (length, _) in enumerate(record.chunks):
        problem = ""
        try:
            reads.check(chunk_of(record, number, begin, fd, path.name, f"'{path}'", cipher))
            reads.finish()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        yield Verified(path.name, length, problem)
        begin += length
