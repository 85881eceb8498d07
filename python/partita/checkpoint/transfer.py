"""Bytes between tensors and files, in chunks with digests, by native threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from types import TracebackType

import torch
from torch import Tensor

from partita._core import FileQueue, xxh3_64
from partita.checkpoint.layout import MIN_CHUNK_BYTES
from partita.checkpoint.sealing import TAG_BYTES
from partita.device import HOST, kernels

COPIED_BYTES = 64 << 20  # of copies on the host that wait to be written, at most
THREADS = 2
BLOCK_BYTES = 4096  # of files; whole ones can be written past the page cache
DIRECT_BYTES = 64 << 10  # of a run; less is not worth it

# What a job is about: the number of a file, and words for an error.
Label = tuple[int, str]
# Encrypts a chunk: the number of its file, its offset, its bytes, room for them and a tag. Returns the seal.
Seals = Callable[[int, int, memoryview, memoryview], bytes]
# (file, offset, length, digest, seal) of what was written or read in one piece; the seal in hex, if there is one.
Done = tuple[int, int, int, str, str]


def digest_text(data: bytes | bytearray) -> str:
    """The digest of a chunk, as a manifest has it."""
    return digest_of(torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)])


def digest_of(values: Tensor) -> str:
    """The digest of a contiguous tensor's bytes, as a manifest has it."""
    return f"{xxh3_64(kernels.address(values), values.nbytes):016x}"


def chunks_of(offset: int, values: Tensor, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(offset, part) of the chunks in which a flat tensor is written, from an offset in a file on.

    What a long one has of the blocks at its ends are chunks of their own; those between them are of whole blocks.
    """
    size = values.element_size()
    before = -offset % BLOCK_BYTES
    cuts = [0, values.numel()]
    if values.nbytes >= DIRECT_BYTES and before % size == 0:
        cuts[1:1] = [before // size, (before + (values.nbytes - before) // BLOCK_BYTES * BLOCK_BYTES) // size]
    for begin, end in pairwise(cuts):
        for first in range(begin, end, chunk_bytes // size):
            yield offset + first * size, values[first : min(first + chunk_bytes // size, end)]


@dataclass
class _Job:
    """offset, nbytes: in the file. kept: memory that must last until then. reads_live: out of memory that others change
    later."""

    label: Label
    offset: int
    nbytes: int
    kept: list[Tensor] = field(default_factory=list)
    reads_live: bool = False
    seal: str = ""


class HostRoom:
    """Memory on the host for copies of one save after the other. Pages that were used once are faster than new ones."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=HOST)

    def of(self, nbytes: int) -> Tensor:
        """At least so many bytes, with whatever was in them; only what is written to takes memory."""
        if self._memory.nbytes < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=HOST)
        return self._memory


class Transfer:
    """Reads and writes of one rank, under way together.

    Errors are raised by the call that waits: `finish()`, or one that needs room for copies.

    Args:
        chunk_bytes: of what is written; a multiple of the size of every element.
        room: for `take_over()`; nobody else uses it meanwhile. What a device has is then copied without waiting for
            earlier copies to be written.
        seals: encrypts what is written; None: it is written as it is. Encrypted chunks are copies.
    """

    def __init__(
        self, chunk_bytes: int = MIN_CHUNK_BYTES, room: HostRoom | None = None, seals: Seals | None = None
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._room = room
        self._seals = seals
        self._queue = FileQueue(THREADS)
        self._jobs: list[_Job] = []
        self._ends: list[tuple[int, int, Tensor, Label]] = []  # chunks that wait for those of whole blocks
        self._done: list[Done] = []
        self._copied = 0
        self._settled = 0  # jobs before those of _jobs

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The end of the queue is the end of its threads: nothing uses a file or the memory of a job after that. A wait
        # might be interrupted.
        del self._queue
        self._jobs.clear()

    def write(self, fd: int, offset: int, values: Tensor, label: Label, direct: int | None = None) -> None:
        """Writes a flat tensor, which must not change until `finish()` or `take_over()`. A device's is copied.

        Args:
            direct: the same file, opened with O_DIRECT. Whole blocks are written through it, and the rest by `sync()`:
                a file's other writes would each wait until none of them is under way.
        """
        for begin, part in chunks_of(offset, values, self._chunk_bytes):
            if direct is not None and (begin % BLOCK_BYTES or part.nbytes % BLOCK_BYTES):
                self._ends.append((fd, begin, part, label))
            else:
                self._write_chunk(fd, begin, part, label, direct)

    def write_data(self, fd: int, offset: int, data: bytes, label: Label) -> None:
        """Writes bytes as one chunk."""
        self._write(fd, offset, torch.frombuffer(bytearray(data), dtype=torch.uint8), label)

    def sync(self, fd: int, label: Label) -> None:
        """What was written to `fd` so far will be on the disk."""
        ends, self._ends = self._ends, []
        for end in ends:
            self._write_chunk(*end)
        self._queue.sync(fd)
        self._jobs.append(_Job(label, 0, 0))

    def take_over(self) -> int:
        """The tensors that are written may change when this returns. What is left of them has been copied; the number
        of these bytes. Once in the life of a transfer."""
        assert self._room is not None
        runs = list(self._live_runs())
        room = self._room.of(sum(nbytes for _, _, nbytes in runs))
        copied = 0
        for first, last, _ in runs:
            copied += self._queue.take_over(first, last, kernels.address(room) + copied)
        return copied

    def is_done(self) -> bool:
        """Whether `finish()` would not wait."""
        return self._queue.idle()

    def finish(self) -> list[Done]:
        """Waits for everything; all that was written or read.

        Raises:
            OSError: what the system said, with file and place.
            CheckpointError: bytes are not those that were saved.
        """
        self._settle()
        done, self._done = self._done, []
        return done

    def _write_chunk(self, fd: int, offset: int, part: Tensor, label: Label, direct: int | None = None) -> None:
        is_here = part.device.type == "cpu"
        if not is_here:
            part = part.to(HOST)
        if not is_here or self._seals is not None:
            self._make_room(part.nbytes)
        self._write(fd, offset, part, label, direct, reads_live=is_here)

    def _write(
        self,
        fd: int,
        offset: int,
        part: Tensor,
        label: Label,
        direct: int | None = None,
        *,
        reads_live: bool = False,
    ) -> None:
        nbytes, seal = part.nbytes, b""
        if not nbytes:
            return
        if self._seals is not None:
            room = torch.empty(nbytes + TAG_BYTES, dtype=torch.uint8, device=HOST)
            seal = self._seals(label[0], offset, kernels.memory(part), kernels.memory(room))
            part, reads_live = room, False
        self._queue.write(fd, offset, kernels.address(part), nbytes, -1 if direct is None else direct)
        self._jobs.append(_Job(label, offset, nbytes, kept=[part], reads_live=reads_live, seal=seal.hex()))

    def _live_runs(self) -> Iterator[tuple[int, int, int]]:
        """(first, last, bytes) of jobs in a row that write out of memory that others change."""
        numbered = enumerate(self._jobs, self._settled)
        for reads_live, run in groupby(list(numbered), lambda item: item[1].reads_live):
            jobs = list(run)
            if reads_live:
                yield jobs[0][0], jobs[-1][0] + 1, sum(job.nbytes for _, job in jobs)

    def _make_room(self, nbytes: int) -> None:
        self._copied += nbytes
        if self._room is None and self._copied > COPIED_BYTES:
            self._settle()
            self._copied = nbytes

    def _settle(self) -> None:
        results = self._queue.wait()  # may be interrupted: the jobs keep their memory
        jobs, self._jobs = self._jobs, []
        self._settled += len(jobs)
        for job, (error, digest) in zip(jobs, results, strict=True):
            place = f"{job.label[1]}, bytes {job.offset:,} to {job.offset + job.nbytes:,}"
            if error:
                raise OSError(error, f"{os.strerror(error)}: {place}")
            if job.nbytes:
                self._done.append((job.label[0], job.offset, job.nbytes, f"{digest:016x}", job.seal))
