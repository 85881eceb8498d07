"""How a save writes: chunks of whole blocks past the page cache, and the ends of runs after them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partita import Engine
from partita.checkpoint.transfer import BLOCK_BYTES, DIRECT_BYTES, Transfer, chunks_of
from small_models import config
from torch import nn

CHUNK_BYTES = 1 << 20


def cached(path: Path) -> list[bool]:
    """Of every block of a file, whether it is in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        blocks = (ctypes.c_ubyte * -(-len(mapped) // BLOCK_BYTES))()
        error = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), blocks)
        del first
        assert error == 0
        return [bool(block & 1) for block in blocks]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder of a file system whose files can be outside of memory."""
    path = tmp_path / "probe"
    path.write_bytes(b"")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        os.pwrite(fd, block, 0)
    os.close(fd)
    if any(cached(path)):
        pytest.skip("this file system keeps its files in memory")
    path.unlink()
    return tmp_path


@given(
    st.integers(0, 3 * BLOCK_BYTES), st.integers(0, 700_000), st.sampled_from([torch.uint8, torch.int16, torch.int32])
)
@settings(deadline=None, max_examples=200)
def test_chunks_follow_each_other_and_long_runs_are_whole_blocks(offset, numel, dtype):
    values = torch.empty(numel, dtype=dtype, device="cpu")
    end, broken = offset, 0
    for begin, part in chunks_of(offset, values, CHUNK_BYTES):
        assert begin == end and 0 < part.nbytes <= CHUNK_BYTES
        assert part.data_ptr() == values.data_ptr() + begin - offset
        end += part.nbytes
        broken += begin % BLOCK_BYTES != 0 or part.nbytes % BLOCK_BYTES != 0
    assert end == offset + values.nbytes
    if values.nbytes >= DIRECT_BYTES and offset % values.element_size() == 0:
        assert broken <= 2


def test_whole_blocks_are_not_in_the_page_cache(disk):
    """From the first byte to the last the file has what was written, wherever runs begin and end."""
    path = disk / "file"
    generator = torch.Generator().manual_seed(1)
    runs = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in (3_000_000, 500, 200_001)]
    fd, direct = os.open(path, os.O_WRONLY | os.O_CREAT), os.open(path, os.O_WRONLY | os.O_DIRECT)
    offset = 100
    os.posix_fallocate(fd, 0, offset + sum(run.nbytes for run in runs))
    with Transfer(CHUNK_BYTES) as transfer:
        transfer.write_data(fd, 0, bytes(100), (0, "head"))
        for run in runs:
            transfer.write(fd, offset, run, (0, "run"), direct)
            offset += run.nbytes
        transfer.sync(fd, (0, "file"))
        done = transfer.finish()
    os.close(fd)
    os.close(direct)
    assert sum(cached(path)) <= 6  # the ends of the runs
    assert path.read_bytes() == bytes(100) + b"".join(run.numpy().tobytes() for run in runs)
    assert sum(length for _, _, length, *_ in done) == offset


def test_a_save_leaves_the_page_cache_to_others(disk):
    engine = Engine(nn.Linear(512, 512), config=config(bf16={"enabled": True}, zero_optimization={"stage": 1}))
    engine.backward(engine(torch.ones(2, 512, dtype=torch.bfloat16)).float().sum())
    engine.step()
    path = engine.save_checkpoint(disk, "tag")
    for name in ("model.safetensors", "optimizer.safetensors"):
        blocks = cached(path / name)
        assert len(blocks) > 100 and sum(blocks) < len(blocks) / 5, name
    engine.destroy()
