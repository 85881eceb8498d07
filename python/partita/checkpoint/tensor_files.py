"""Tensors in safetensors files that are open: runs of their elements are checked, and read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.layout import StoredTensor
from partita.checkpoint.places import Place
from partita.checkpoint.reads import Chunk, Reads
from partita.device import kernels
from partita.model import DTYPE_NAMES

PIECE_NUMEL = 2**19  # elements that pass through at once, unless a chunk has more

# Gets the number of the first of some elements, and their values in each of several tensors.
Take = Callable[[int, list[Tensor]], object]

Files = TypeVar("Files", bound="TensorFiles")

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorFiles(ABC):
    """The tensors of some files. Nothing is read but the headers, until somebody asks. A subclass opens the files.

    Attributes:
        tensors: where each is in its file.
    """

    def __init__(self) -> None:
        self._exits = ExitStack()
        self._reads = self._exits.enter_context(Reads())
        self._checked: set[tuple[int, int]] = set()  # chunks: file descriptor and number
        self._fds: dict[str, int] = {}  # by the name of the file
        self.tensors: dict[Place, StoredTensor] = {}

    def __enter__(self: Files) -> Files:
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
        """Compares the chunks that have these elements with their digests, where there are digests: each chunk once,
        and keeps nothing. It is done after `finish()`.

        Raises:
            CheckpointError: the tensor has fewer elements, or a dtype that is not read.
        """
        for number, chunk in self._chunks(place, *self._range(place, first, numel)):
            if chunk.digest is not None and (chunk.fd, number) not in self._checked:
                self._checked.add((chunk.fd, number))
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

    def reads_into(self, place: Place, target: Tensor) -> bool:
        """Whether the bytes of a stored tensor are those of this tensor's memory, which the host can write."""
        is_here = target.is_cpu and target.is_contiguous() and kernels.why_no_address(target) is None
        return is_here and target.dtype == self.dtype(place)

    def read_into(self, place: Place, first: int, target: Tensor) -> None:
        """Reads elements from `first` on into a flat tensor of any dtype and device."""
        if self.reads_into(place, target):
            self.read(place, first, target)
        else:
            self.pass_on([place], first, target.numel(), partial(_copy, target))

    def read_whole_into(self, place: Place, tensor: Tensor) -> None:
        """Reads a stored tensor into one of its shape. What is not contiguous is read into memory of its own first."""
        if tensor.is_contiguous():
            self.read_into(place, 0, tensor.view(-1))
            torch.autograd.graph.increment_version(tensor)
        else:
            flat = tensor.new_empty(tensor.numel())
            self.read_into(place, 0, flat)
            self._reads.then(lambda: tensor.copy_(flat.view(tensor.shape)))

    def finish(self) -> int:
        """Waits until all that was asked for is there; the number of bytes read.

        Raises:
            OSError, CheckpointError: a file cannot be read, or has other bytes than were saved.
        """
        return self._reads.finish()

    def identity(self) -> str:
        """The same text where the same files are open."""
        told = [os.fstat(fd) for fd in self._fds.values()]
        return str([(name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in zip(self._fds, told, strict=True)])

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

    @abstractmethod
    def _chunks(self, place: Place, begin: int, end: int) -> Iterator[tuple[int, Chunk]]:
        """The chunks that have bytes [begin, end) of the tensor's file, with their numbers, in order."""


def _copy(target: Tensor, first: int, values: Sequence[Tensor]) -> None:
    target[first : first + len(values[0])].copy_(values[0])
