"""malloc gives back what it has when much was freed on the host."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from partita.device import HOST, FreedMemory
from partita.device.memory import FREED_LIMIT_BYTES

GPU = torch.device("cuda", 1)


@pytest.fixture
def trims(monkeypatch) -> list[int]:
    """One entry per call of malloc_trim()."""
    calls: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(malloc_trim=calls.append))
    return calls


def test_many_freed_bytes_of_the_host_are_given_back_together(trims):
    freed = FreedMemory()
    freed.add(FREED_LIMIT_BYTES - 1, HOST)
    assert not trims
    freed.add(1, HOST)
    assert trims == [0]
    freed.add(FREED_LIMIT_BYTES - 1, HOST)
    assert trims == [0]
    freed.add(1, HOST)
    assert trims == [0, 0]


def test_what_a_gpu_frees_is_nothing_to_malloc(trims):
    """It would search all of the heap for nothing, while the GPU has nothing to do."""
    freed = FreedMemory()
    for _ in range(3):
        freed.add(10 * FREED_LIMIT_BYTES, GPU)
    freed.add(FREED_LIMIT_BYTES - 1, HOST)
    assert not trims
