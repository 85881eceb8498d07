"""Chunks of files on their way into memory, each compared with its digest, by native threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from partita._core import FileQueue
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.sealing import TAG_BYTES
from partita.device import HOST, flat_buffer, kernels

THREADS = 2
ROOM_BYTES = 2 << 20  # for what passes through: twice that, and more where one piece is larger
ALIGNMENT_BYTES = 64

NOT_SEALED = "this is not what was encrypted here: it was changed, or is from another place or checkpoint"

# Decrypts a chunk: its bytes with room for a tag, room for what they are. False: it is not what was sealed.
Opens = Callable[[memoryview, memoryview], bool]


@dataclass(frozen=True)
class Chunk:
    """A run of bytes with a digest.

    offset: in the file. digest: None: nobody knows it. what: for an error. opens: decrypts it; None: it is as it is.
    """

    fd: int
    offset: int
    nbytes: int
    digest: str | None
    what: str
    opens: Opens | None = None

    def __str__(self) -> str:
        return f"{self.what}, bytes {self.offset:,} to {self.offset + self.nbytes:,}"


@dataclass(frozen=True)
class _Job:
    """kept: memory that must last until it is done."""

    chunk: Chunk
    kept: Tensor | None = None


class Reads:
    """Reads of one rank, under way together. Errors are raised by the call that waits: `finish()`, or one that needs
    room.

    [Note: room for what passes through]
    What cannot be read to where it is wanted, as it is encrypted or in another format, passes through one of two
    memories of a fixed size. While one is filled, what came into the other is taken from there. So no more memory is
    used however much is read, and it stays in the cache.
    """

    def __init__(self) -> None:
        self._queue = FileQueue(THREADS)
        self._steps: deque[_Job | Callable[[], object]] = deque()  # in the order in which they are done
        self._settled = 0  # steps before those of _steps
        self._read_bytes = 0
        self._pieces, self._sealed = _Rooms(), _Rooms()

    def __enter__(self) -> Reads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of the queue is the end of its threads: nothing uses a file or the memory of a job after that. A wait
        # might be interrupted.
        del self._queue
        self._steps.clear()

    def check(self, chunk: Chunk) -> None:
        """Reads a chunk and keeps nothing of it."""
        if chunk.opens is not None:
            self._open(chunk, chunk.opens, 0, None)
            return
        self._queue.read_part(chunk.fd, chunk.offset, chunk.nbytes, 0, 0, 0)
        self._steps.append(_Job(chunk))

    def read(self, chunk: Chunk, first: int, into: Tensor) -> None:
        """Reads a chunk and keeps the bytes from number `first` on.

        Args:
            into: gets them; contiguous, on the host.
        """
        if chunk.opens is not None:
            self._open(chunk, chunk.opens, first, into.view(torch.uint8))
            return
        self._queue.read_part(chunk.fd, chunk.offset, chunk.nbytes, first, kernels.address(into), into.nbytes)
        self._steps.append(_Job(chunk, into))

    def room(self, nbytes: list[int]) -> list[Tensor]:
        """Memory on the host for a piece that passes through, in parts of so many bytes each. It is valid for the steps
        that are asked for until the next call; see [Note: room for what passes through]."""
        return self._room(self._pieces, nbytes)

    def then(self, action: Callable[[], object]) -> None:
        """Does something once everything that was asked for before is there."""
        self._steps.append(action)

    def finish(self) -> int:
        """Waits until everything is there and done; the bytes that were read since the last call.

        Raises:
            OSError: what the system said, with file and place.
            CheckpointError: bytes are not those that were saved.
        """
        self._settle(len(self._steps))
        read_bytes, self._read_bytes = self._read_bytes, 0
        return read_bytes

    def _open(self, chunk: Chunk, opens: Opens, first: int, into: Tensor | None) -> None:
        """Reads a chunk that is encrypted."""
        is_all = into is not None and into.nbytes == chunk.nbytes
        sizes = [chunk.nbytes + TAG_BYTES, 0 if is_all else chunk.nbytes]
        sealed, plain = self._room(self._sealed, sizes)
        if is_all and into is not None:
            plain = into
        self._queue.read(chunk.fd, chunk.offset, kernels.address(sealed), chunk.nbytes)
        self._steps += (_Job(chunk, sealed), partial(_unseal, chunk, opens, sealed, plain))
        if into is not None and not is_all:
            self._steps.append(partial(into.copy_, plain[first : first + into.nbytes]))

    def _room(self, rooms: _Rooms, nbytes: list[int]) -> list[Tensor]:
        sizes = [-(-n // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for n in nbytes]
        if rooms.is_full(sum(sizes)):
            self._settle(max(0, rooms.begun_with - self._settled))
            rooms.turn(self._settled + len(self._steps), sum(sizes))
        return [rooms.take(size)[:n] for size, n in zip(sizes, nbytes, strict=True)]

    def _settle(self, count: int) -> None:
        """Waits for the first so many steps, and does what is to be done."""
        steps = [self._steps[i] for i in range(count)]
        results = iter(self._queue.wait(sum(isinstance(step, _Job) for step in steps)))  # may be interrupted
        for _ in steps:
            self._steps.popleft()
        self._settled += count
        for step in steps:
            if isinstance(step, _Job):
                _require_sound(step.chunk, *next(results))
                self._read_bytes += step.chunk.nbytes
            else:
                step()


class _Rooms:
    """Two memories that take turns; see [Note: room for what passes through].

    Attributes:
        begun_with: how many steps there were when the memory of now was begun with: those use the other one.
    """

    def __init__(self) -> None:
        self._memories = deque(torch.empty(0, dtype=torch.uint8, device=HOST) for _ in range(2))
        self._used_bytes = 0
        self.begun_with = 0

    def is_full(self, nbytes: int) -> bool:
        """Whether so many bytes more have no room in the memory of now."""
        return self._used_bytes + nbytes > self._memories[0].nbytes

    def turn(self, steps: int, nbytes: int) -> None:
        """The other memory is used from now on; it has room for at least so many bytes.

        Args:
            steps: how many there are.
        """
        self._memories.rotate()
        self._used_bytes, self.begun_with = 0, steps
        if self._memories[0].nbytes < nbytes:
            self._memories[0] = flat_buffer(max(nbytes, ROOM_BYTES), torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """Room for so many bytes."""
        self._used_bytes += nbytes
        return self._memories[0][self._used_bytes - nbytes : self._used_bytes]


def _require_sound(chunk: Chunk, error: int, digest: int) -> None:
    if error < 0:
        raise CheckpointError(f"{chunk}: the file is shorter")
    if error:
        raise OSError(error, f"{os.strerror(error)}: {chunk}")
    if chunk.digest is not None and f"{digest:016x}" != chunk.digest:
        raise CheckpointError(f"{chunk}: these are not the bytes that were saved (their digest differs)")


def _unseal(chunk: Chunk, opens: Opens, sealed: Tensor, plain: Tensor) -> None:
    if not opens(kernels.memory(sealed), kernels.memory(plain)):
        raise CheckpointError(f"{chunk}: {NOT_SEALED}")
