"""A checkpoint that is read: its tensors, and runs of their elements."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
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
from partita.checkpoint.reads import NOT_SEALED, Chunk, Reads
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.transfer import digest_text
from partita.model import DTYPE_NAMES

PIECE_NUMEL = 2**19  # elements that pass through at once, unless a chunk has more

# Gets the number of the first of some elements, and their values in each of several tensors.
Take = Callable[[int, list[Tensor]], object]

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
        self._reads = self._exits.enter_context(Reads())
        self._checked: set[tuple[str, int]] = set()  # chunks
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

    def check(self, place: Place, first: int, numel: int) -> None:
        """Compares the chunks that have these elements with their digests, each chunk once, and keeps nothing. It is
        done after `finish()`.

        Raises:
            CheckpointError: the tensor has fewer elements, or a dtype that is not read.
        """
        for number, chunk in self._chunks(place, *self._range(place, first, numel)):
            if (self.tensors[place].file, number) not in self._checked:
                self._checked.add((self.tensors[place].file, number))
                self._reads.check(chunk)

    def read(self, place: Place, first: int, into: Tensor) -> None:
        """Reads elements from `first` on into contiguous memory on the host, of the tensor's dtype. They are there
        after `finish()`, and what was there before may be gone where that raises."""
        begin, end = self._range(place, first, into.numel())
        raw = into.view(torch.uint8)
        for _, chunk in self._chunks(place, begin, end):
            start, stop = max(begin, chunk.offset), min(end, chunk.offset + chunk.nbytes)
            self._reads.read(chunk, start - chunk.offset, raw[start - begin : stop - begin])

    def pass_on(self, places: Sequence[Place], first: int, numel: int, take: Take) -> None:
        """Reads the same elements of several tensors into memory that is used again, some at a time.

        Args:
            take: is called with the number of the first of these elements, counted from `first`, and with the elements
                of each tensor, in its dtype. It is through with them when it returns.
        """
        dtypes = [self.dtype(place) for place in places]
        for begin, end in self._runs(places[0], first, first + numel):
            rooms = self._reads.room([(end - begin) * dtype.itemsize for dtype in dtypes])
            values = [room.view(dtype) for room, dtype in zip(rooms, dtypes, strict=True)]
            for place, into in zip(places, values, strict=True):
                self.read(place, begin, into)
            self._reads.then(partial(take, begin - first, values))

    def finish(self) -> int:
        """Waits until all that was asked for is there; the number of bytes read.

        Raises:
            OSError, CheckpointError: a file cannot be read, or has other bytes than were saved.
        """
        return self._reads.finish()

    def _range(self, place: Place, first: int, numel: int) -> tuple[int, int]:
        """Where elements begin and end in their file."""
        tensor, size = self.tensors[place], self.dtype(place).itemsize
        begin = tensor.begin + first * size
        end = begin + numel * size
        if end > tensor.begin + tensor.nbytes:
            raise CheckpointError(f"'{place.name}' in {tensor.file} has fewer elements than are asked for")
        return begin, end

    def _runs(self, place: Place, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Elements in pieces of a bounded size, which end where chunks do, so that no chunk is read twice."""
        size = self.dtype(place).itemsize
        origin = self.tensors[place].begin
        begin = end = first
        for _, chunk in self._chunks(place, origin + first * size, origin + last * size):
            chunk_end = min(last, (chunk.offset + chunk.nbytes - origin) // size)
            if chunk_end - begin > PIECE_NUMEL and end > begin:
                yield begin, end
                begin = end
            end = chunk_end
        if begin < last:
            yield begin, last

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
        """The chunks that have bytes [begin, end) of the tensor's file, with their numbers."""
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
