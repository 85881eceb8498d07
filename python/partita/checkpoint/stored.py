"""A checkpoint that is read: its tensors, and runs of their elements."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import open_file
from partita.checkpoint.layout import parse_header
from partita.checkpoint.manifest import FileRecord, Manifest
from partita.checkpoint.places import Place, stem_of
from partita.checkpoint.reads import NOT_SEALED, Chunk
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.tensor_files import TensorFiles
from partita.checkpoint.transfer import digest_text


class Stored(TensorFiles):
    """The tensors of a checkpoint.

    Args:
        cipher: opens an encrypted checkpoint; None: it is not encrypted.
        stem: what the names of the files begin with that are opened; empty: all of tensors.

    Raises:
        CheckpointError: a file is missing, has another size, or a header is not what was saved.
    """

    def __init__(self, folder: Path, manifest: Manifest, cipher: Cipher | None = None, stem: str = "") -> None:
        super().__init__()
        self._folder = folder
        self._cipher = cipher
        self._ends: dict[str, list[int]] = {}
        self._records = manifest.files
        with ExitStack() as undo:
            undo.callback(self._exits.close)
            for name, record in manifest.files.items():
                if name.endswith(".safetensors") and stem in ("", stem_of(name)):
                    self._open(name, record)
            undo.pop_all()

    def _open(self, name: str, record: FileRecord) -> None:
        fd = open_file(self._folder, name)
        self._exits.callback(os.close, fd)
        path = self._folder / name
        size = os.fstat(fd).st_size
        if size != record.size:
            raise CheckpointError(f"'{path}' has {size:,} bytes, and had {record.size:,} when it was saved")
        self._fds[name] = fd
        self._ends[name] = list(accumulate(length for length, _ in record.chunks))
        length, digest = record.chunks[0] if record.chunks else (0, "")
        head = os.pread(fd, length, 0)
        if digest_text(head) != digest:
            raise CheckpointError(f"'{path}', bytes 0 to {length:,}: this is not the header that was saved")
        head = _opened(head, self._cipher, path, record, 0, 0)
        for tensor, stored in parse_header(head, size, name).items():
            self.tensors[Place(stem_of(name), tensor)] = stored

    def _chunks(self, place: Place, begin: int, end: int) -> Iterator[tuple[int, Chunk]]:
        name = self.tensors[place].file
        ends, record, what = self._ends[name], self._records[name], f"'{place.name}' in '{self._folder / name}'"
        if begin < end:
            for i in range(bisect_right(ends, begin), bisect_left(ends, end) + 1):
                yield i, chunk_of(record, i, ends[i] - record.chunks[i][0], self._fds[name], name, what, self._cipher)


def chunk_of(
    record: FileRecord, number: int, offset: int, fd: int, name: str, what: str, cipher: Cipher | None
) -> Chunk:
    """A chunk of a file, to be read.

    Args:
        offset: of the chunk. name: of the file. what: for an error. cipher: None, for a file that is encrypted: the
            chunk is read as it is.
    """
    nbytes, digest = record.chunks[number]
    opens = None
    if cipher is not None and record.seals is not None:
        opens = partial(cipher.open, name, offset, bytes.fromhex(record.seals[number]))
    return Chunk(fd, offset, nbytes, digest, what, opens)


def read_whole(folder: Path, name: str, record: FileRecord, cipher: Cipher | None = None) -> bytes:
    """A small file, whose digests are right.

    Raises:
        OSError, CheckpointError: it cannot be read, or has other bytes than were saved.
    """
    fd = open_file(folder, name)
    try:
        parts = []
        begin = 0
        for number, (length, digest) in enumerate(record.chunks):
            part = os.pread(fd, length, begin)
            if digest_text(part) != digest:
                raise CheckpointError(
                    f"'{folder / name}', bytes {begin:,} to {begin + length:,}: these are not the bytes that were saved"
                )
            parts.append(_opened(part, cipher, folder / name, record, number, begin))
            begin += length
        if os.fstat(fd).st_size != record.size:
            raise CheckpointError(f"'{folder / name}' has other than {record.size:,} bytes")
        return b"".join(parts)
    finally:
        os.close(fd)


def _opened(data: bytes, cipher: Cipher | None, path: Path, record: FileRecord, number: int, offset: int) -> bytes:
    """What a chunk that was read says."""
    if record.seals is None:
        return data
    if cipher is None:
        raise CheckpointError(f"'{path}' is encrypted, and no key was given")
    plain = cipher.open_bytes(path.name, offset, data, bytes.fromhex(record.seals[number]))
    if plain is None:
        raise CheckpointError(f"'{path}', bytes {offset:,} to {offset + len(data):,}: {NOT_SEALED}")
    return plain
