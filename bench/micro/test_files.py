"""The file queue against plain pwrite and pread of the same bytes without a digest, in the page cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from partita._core import FileQueue, xxh3_64
from partita.device.memory import flat_buffer
from torch import Tensor
from turns import Action, time_in_turns

NBYTES = 512 << 20
JOB_BYTES = 8 << 20
STARTS = range(0, NBYTES, JOB_BYTES)


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return flat_buffer(NBYTES // 4, torch.float32).random_().view(torch.uint8)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A preallocated file whose pages are in the cache."""
    path = tmp_path / "file"
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(opened, 0, NBYTES)
    yield opened
    os.close(opened)
    path.unlink()


def by_system(threads: int, move: Callable[[int], int]) -> Action:
    """`move` for the start of each job, by threads of Python, which leave its lock to each other meanwhile."""
    pool = ThreadPoolExecutor(threads)

    def action() -> None:
        assert all(moved == JOB_BYTES for moved in pool.map(move, STARTS))

    return action


def by_queue(threads: int, call: str, fd: int, memory: Tensor) -> Action:
    queue = FileQueue(threads)

    def action() -> None:
        for start in STARTS:
            getattr(queue, call)(fd, start, memory.data_ptr() + start, JOB_BYTES)
        assert all(error == 0 for error, _ in queue.wait())

    return action


@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}-threads")
def test_write(benchmark: Any, fd: int, memory: Tensor, threads: int) -> None:
    view = memoryview(memory.numpy())
    pwrite = by_system(threads, lambda start: os.pwrite(fd, view[start : start + JOB_BYTES], start))
    time_in_turns(benchmark, NBYTES, by_queue(threads, "write", fd, memory), {"pwrite": pwrite})


@pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}-threads")
def test_read(benchmark: Any, fd: int, memory: Tensor, threads: int) -> None:
    view = memoryview(memory.numpy())
    pread = by_system(threads, lambda start: os.preadv(fd, [view[start : start + JOB_BYTES]], start))
    pread()
    time_in_turns(benchmark, NBYTES, by_queue(threads, "read", fd, memory), {"pread": pread})


def test_xxh3_64(benchmark: Any, memory: Tensor) -> None:
    """One core, out of memory and out of the cache, beside the package xxhash."""
    xxhash = pytest.importorskip("xxhash")
    view = memoryview(memory.numpy())
    piece = 512 << 10
    time_in_turns(
        benchmark,
        NBYTES,
        lambda: xxh3_64(memory.data_ptr(), NBYTES),
        {
            "xxhash": lambda: xxhash.xxh3_64_intdigest(view),
            "ours in the cache": lambda: [xxh3_64(memory.data_ptr(), piece) for _ in range(NBYTES // piece)],
        },
    )
