"""partita._core.FileQueue and xxh3_64: the digests of the xxhash package, files, errors, waits that a signal ends."""

from __future__ import annotations

import _thread
import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from partita._core import FileQueue, xxh3_64

JOB_BYTES = 600_000
JOBS = 5


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def address(memory: np.ndarray) -> int:
    return int(memory.ctypes.data)


def digest(memory: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(memory.tobytes())


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


# -- digests


@pytest.mark.parametrize("misalignment", [0, 1, 3, 8, 61])
def test_the_digest_is_that_of_the_package(misalignment: int) -> None:
    memory = random_bytes((8 << 20) + 200)[misalignment:]
    around = [end + more for end in (2048, 4096, 1 << 18, 8 << 20) for more in (-1, 0, 1, 63, 64, 65)]
    for nbytes in [*range(1101), *around, 1_000_003]:
        assert xxh3_64(address(memory), nbytes) == digest(memory[:nbytes]), nbytes


@given(st.binary(max_size=2000))
@settings(deadline=None)
def test_the_digest_of_any_bytes(data: bytes) -> None:
    memory = np.frombuffer(data, dtype=np.uint8)
    assert f"{xxh3_64(address(memory), len(data)):016x}" == xxhash.xxh3_64_hexdigest(data)


def test_a_negative_size_has_no_digest() -> None:
    with pytest.raises(ValueError, match="nbytes must not be negative: -1"):
        xxh3_64(0, -1)


# -- files


@pytest.mark.parametrize("nbytes", [1, 1000, 512 << 10, (512 << 10) + 1, 3_000_001])
def test_a_part_of_what_is_read_is_kept(fd: int, nbytes: int) -> None:
    """The digest is of all bytes; nothing beside the part is written in memory."""
    queue = FileQueue(1)
    memory = random_bytes(nbytes)
    os.pwrite(fd, memory.tobytes(), 7)
    kept = [(0, 0), (nbytes, 0), (0, 1), (nbytes - 1, 1), (nbytes // 3, nbytes // 2), (0, nbytes)]
    back = np.zeros((len(kept), nbytes + 2), np.uint8)
    for row, (first, count) in zip(back, kept, strict=True):
        queue.read_part(fd, 7, nbytes, first, address(row) + 1 if count else 0, count)
    assert queue.wait() == [(0, digest(memory))] * len(kept)
    for row, (first, count) in zip(back, kept, strict=True):
        assert row[1 : count + 1].tobytes() == memory[first : first + count].tobytes()
        assert not row[0] and not row[count + 1 :].any()


def test_a_part_beyond_what_is_read_is_refused(fd: int) -> None:
    queue = FileQueue(1)
    back = np.zeros(10, np.uint8)
    for first, count in [(-1, 2), (0, 11), (10, 1), (11, 0)]:
        with pytest.raises(ValueError, match="are no part of 10"):
            queue.read_part(fd, 0, 10, first, address(back), count)
    with pytest.raises(ValueError, match="neither may be negative"):
        queue.read_part(fd, 0, -1, 0, 0, 0)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_is_written_is_read_with_the_same_digests(fd: int, threads: int) -> None:
    queue = FileQueue(threads)
    memory = random_bytes(JOBS * JOB_BYTES)
    back = np.zeros_like(memory)
    starts = range(0, memory.size, JOB_BYTES)
    numbers = [queue.write(fd, start, address(memory) + start, JOB_BYTES) for start in starts]
    numbers.append(queue.sync(fd))
    written = queue.wait()
    numbers += [queue.read(fd, start, address(back) + start, JOB_BYTES) for start in starts]
    digests = [(0, digest(memory[start : start + JOB_BYTES])) for start in starts]
    assert written == [*digests, (0, 0)]
    assert queue.wait(2) + queue.wait() == digests
    assert queue.wait() == []
    assert numbers == list(range(2 * JOBS + 1))
    assert np.array_equal(back, memory)
    assert os.pread(fd, memory.size + 1, 0) == memory.tobytes()


def test_errors_are_those_of_their_jobs(fd: int) -> None:
    queue = FileQueue(2)
    memory = random_bytes(10)
    queue.write(-1, 0, address(memory), 10)
    queue.write(fd, 0, address(memory), 10)
    assert queue.wait() == [(errno.EBADF, 0), (0, digest(memory))]
    queue.read(fd, 0, address(memory), 11)
    queue.sync(-1)
    assert queue.wait() == [(-1, 0), (errno.EBADF, 0)]


def test_memory_that_was_taken_over_may_change(fd: int) -> None:
    queue = FileQueue(1)
    memory = random_bytes(40 * JOB_BYTES)
    before = memory.copy()
    copies = np.zeros_like(memory)
    for start in range(0, memory.size, JOB_BYTES):
        queue.write(fd, start, address(memory) + start, JOB_BYTES)
    copied = queue.take_over(0, 40, address(copies))
    memory[:] = 0
    assert copied % JOB_BYTES == 0
    assert all(error == 0 for error, _ in queue.wait())
    assert os.pread(fd, memory.size, 0) == before.tobytes()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda queue: queue.write(0, -1, 1, 1), "1 bytes at offset -1"),
        (lambda queue: queue.read(0, 0, 1, -1), "-1 bytes at offset 0"),
        (lambda queue: queue.write(0, 2**63 - 1, 1, 1), "beyond"),
        (lambda queue: queue.read(0, 0, 0, 1), "address of the bytes is 0"),
        (lambda queue: queue.wait(1), "wait for 1 of 0 jobs"),
        (lambda queue: queue.take_over(0, 1, 0), "take_over of the jobs 0 to 1 of 0"),
        (lambda queue: FileQueue(0), "at least 1 thread: 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(FileQueue(1))


# -- waits


class Endless:
    """A queue with more to do than any test has patience for: a sparse file, read again and again.

    The memory goes after the queue, whoever has this object last: attributes go in the order in which they came.
    """

    def __init__(self, fd: int) -> None:
        os.truncate(fd, 1 << 30)
        self.queue = FileQueue(1)
        self.memory = np.zeros(1 << 20, dtype=np.uint8)
        for start in range(200_000):
            self.queue.read(fd, start % 1000 << 20, address(self.memory), self.memory.size)


@pytest.fixture
def endless(fd: int) -> Endless:
    return Endless(fd)


def test_a_signal_ends_a_wait(endless: Endless) -> None:
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        endless.queue.wait()
    timer.join()
    assert endless.queue.wait(1)[0][0] == 0


def test_other_threads_run_during_a_wait(endless: Endless) -> None:
    """The main thread waits until another one, which needs Python's lock, interrupts it."""
    steps: list[int] = []
    begun = threading.Event()

    def count() -> None:
        begun.wait()
        steps.extend(range(100_000))
        _thread.interrupt_main()

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        begun.set()
        endless.queue.wait()
    thread.join()
    assert len(steps) == 100_000
