"""A checkpoint that is read: its tensors, and runs of their elements."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import open_file
from partita.checkpoint.layout import StoredTensor, parse_header
from partita.checkpoint.manifest import FileRecord, Manifest
from partita.checkpoint.pieces import Place, stem_of
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import NOT_SEALED, Opens, Transfer, digest_text
from partita.model import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Stored:
    """The tensors of a checkpoint. Nothing is read but the headers, until somebody asks.

    Args:
        cipher: opens an encrypted checkpoint; None: it is not encrypted.

    Attributes:
        tensors: where each is in its file.

    Raises:
        CheckpointError: a file is missing, has another size, or a header is not what was saved.
    """

    def __init__(self, folder: Path, manifest: Manifest, cipher: Cipher | None = None) -> None:
        self._folder = folder
        self._cipher = cipher
        self._exits = ExitStack()
        self._fds: dict[str, int] = {}
        self._ends: dict[str, list[int]] = {}
        self._records = manifest.files
        self._transfer = self._exits.enter_context(Transfer())
        self.tensors: dict[Place, StoredTensor] = {}
        with ExitStack() as undo:
            undo.callback(self._exits.close)
            for name, record in manifest.files.items():
                if name.endswith(".safetensors"):
                    self._open(name, record)
            undo.pop_all()

    def __enter__(self) -> Stored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def dtype(self, place: Place) -> torch.dtype:
        """Of a tensor.

        Raises:
            CheckpointError: torch has no such dtype, or this reader does not know it.
        """
        tensor = self.tensors[place]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"'{place.name}' in {tensor.file} is {tensor.dtype}, which is not read here")
        return DTYPES[tensor.dtype]

    def read(self, place: Place, first: int, into: Tensor) -> None:
        """Reads elements from `first` on into a flat tensor of the tensor's dtype. They are there after `finish()`."""
        tensor = self.tensors[place]
        begin = tensor.begin + first * into.element_size()
        end = begin + into.nbytes
        if end > tensor.begin + tensor.nbytes:
            raise CheckpointError(f"'{place.name}' in {tensor.file} has fewer elements than are asked for")
        raw = into.view(torch.uint8)
        for i, chunk in self._chunks(tensor.file, begin, end):
            start, stop = max(begin, chunk[0]), min(end, chunk[0] + chunk[1])
            part = raw[start - begin : stop - begin]
            label = (0, f"'{place.name}' in '{self._folder / tensor.file}'")
            opens = opener(self._cipher, tensor.file, self._records[tensor.file], i, chunk[0])
            self._transfer.read(self._fds[tensor.file], start, chunk, part, label, opens)

    def finish(self) -> int:
        """Waits until all that was asked for is there; the number of bytes read.

        Raises:
            OSError, CheckpointError: a file cannot be read, or has other bytes than were saved.
        """
        return sum(nbytes for _, _, nbytes, _, _ in self._transfer.finish())

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

    def _chunks(self, name: str, begin: int, end: int) -> Iterator[tuple[int, tuple[int, int, str]]]:
        """The chunks that have bytes of [begin, end): number, (offset, length, digest)."""
        ends, chunks = self._ends[name], self._records[name].chunks
        if begin < end:
            for i in range(bisect_right(ends, begin), bisect_left(ends, end) + 1):
                length, digest = chunks[i]
                yield i, (ends[i] - length, length, digest)


def opener(cipher: Cipher | None, name: str, record: FileRecord, number: int, offset: int) -> Opens | None:
    """What decrypts a chunk of a file; None: it is not encrypted."""
    if record.seals is None:
        return None
    if cipher is None:
        raise CheckpointError(f"'{name}' is encrypted, and no key was given")
    return partial(cipher.open, name, offset, bytes.fromhex(record.seals[number]))


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
