"""Whether every byte of a checkpoint is the one that was saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import open_file
from partita.checkpoint.manifest import FileRecord, Manifest
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.stored import opener
from partita.checkpoint.transfer import Transfer
from partita.device import HOST


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
    with Transfer() as transfer:
        for name, record in manifest.files.items():
            try:
                fd = open_file(folder, name)
            except (OSError, CheckpointError) as error:
                yield Verified(name, record.size, str(error))
                continue
            try:
                yield from _verify_file(folder / name, fd, record, transfer, cipher)
            finally:
                os.close(fd)


def _verify_file(
    path: Path, fd: int, record: FileRecord, transfer: Transfer, cipher: Cipher | None
) -> Iterator[Verified]:
    size = os.fstat(fd).st_size
    if size != record.size:
        yield Verified(path.name, 0, f"'{path}' has {size:,} bytes, and had {record.size:,} when it was saved")
        return
    begin = 0
    for number, (length, digest) in enumerate(record.chunks):
        buffer = torch.empty(length, dtype=torch.uint8, device=HOST)
        problem = ""
        try:
            opens = None if cipher is None else opener(cipher, path.name, record, number, begin)
            transfer.read(fd, begin, (begin, length, digest), buffer, (0, f"'{path}'"), opens)
            transfer.finish()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        yield Verified(path.name, length, problem)
        begin += length
