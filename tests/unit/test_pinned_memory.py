"""Pinned host memory: pages of our own, registered as long as they are mapped."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from partita.device import host_buffer, kernels
from partita.device.memory import PAGES_FROM_BYTES, _give_up_pinning
from registered_pages import DEVICE, NO_MEMORY, Runtime, flags_at, is_mapped, registered_pages
from torch import Tensor

LARGE = PAGES_FROM_BYTES // 4 + 1  # elements: some bytes more than whole pages


@pytest.fixture
def cuda() -> Iterator[Runtime]:
    _give_up_pinning.cache_clear()
    with registered_pages() as runtime:
        yield runtime
    _give_up_pinning.cache_clear()


def pinned(numel: int = LARGE) -> Tensor:
    return host_buffer(numel, torch.float32, True)


def test_pages_are_registered_until_nothing_uses_them(cuda):
    """Copies may be under way in the end: the device is waited for, then registration ends, then the pages go."""
    tensor = pinned()
    address, nbytes = kernels.address(tensor), -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    assert cuda.calls == [("register", address, nbytes)]
    assert tensor.numel() == LARGE
    assert tensor.dtype == torch.float32
    assert not tensor.any()
    view = tensor[LARGE // 2 :].fill_(3)
    del tensor
    gc.collect()
    assert view.sum() == 3 * len(view)
    assert len(cuda.calls) == 1
    del view
    gc.collect()
    assert cuda.calls[1:] == [("synchronize", DEVICE), ("unregister", address)]
    assert not is_mapped(address, nbytes)


def test_as_much_is_pinned_as_is_asked_for_in_whole_pages(cuda):
    """torch's allocator would pin the next power of two."""
    sizes = [LARGE, 3 * LARGE, 1_000_003, 2**20 + 1]
    tensors = [pinned(numel) for numel in sizes]
    asked = sum(tensor.nbytes for tensor in tensors)
    assert asked <= cuda.registered_bytes < asked + len(sizes) * mmap.PAGESIZE
    assert cuda.registered_bytes % mmap.PAGESIZE == 0
    tensors.clear()
    gc.collect()
    assert cuda.registered_bytes == 0


def test_without_a_gpu_to_copy_nothing_is_registered(cuda):
    tensor = host_buffer(LARGE, torch.float32, False)
    assert pinned(0).numel() == 0
    del tensor
    gc.collect()
    assert cuda.calls == []


def test_where_nothing_can_be_pinned_the_memory_is_plain_and_a_warning_says_so(cuda, caplog):
    """The error that CUDA keeps is not left to some kernel's launch."""
    cuda.answer = NO_MEMORY
    with caplog.at_level(logging.WARNING, "partita"):
        tensors = [pinned().fill_(i) for i in range(3)]
    assert [int(tensor.sum()) for tensor in tensors] == [0, LARGE, 2 * LARGE]
    assert [call[0] for call in cuda.calls] == ["register", "launch"] * 3
    assert not cuda.has_error
    (message,) = [record.getMessage() for record in caplog.records]
    assert "error 2" in message
    assert "pin_memory" in message
    tensors.clear()
    gc.collect()
    assert len(cuda.calls) == 6


def test_small_buffers_are_torchs(cuda, caplog):
    """Here it has no pinned memory, and says so; that is no error either."""
    with caplog.at_level(logging.WARNING, "partita"):
        tensor = pinned(PAGES_FROM_BYTES // 4 - 1)
    assert not tensor.any()
    assert cuda.calls == []
    assert [("could not be pinned" in record.getMessage()) for record in caplog.records] == [True]


def map_at(address: int, nbytes: int) -> None:
    """Maps something else there."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = 0x10
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
    assert libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address


def test_a_child_has_no_part_in_it(cuda):
    """A fork copies registered pages; a child that ends must not unmap what it has at their addresses by then."""
    tensor = pinned()
    address = kernels.address(tensor)
    assert "dc" in flags_at(address)
    child = os.fork()
    if not child:
        status = 1
        try:
            assert not is_mapped(address, tensor.nbytes)
            map_at(address, tensor.nbytes)
            nbytes = tensor.nbytes
            del tensor
            gc.collect()
            status = 0 if len(cuda.calls) == 1 and is_mapped(address, nbytes) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.fill_(1).sum() == LARGE


def test_the_end_of_python_waits_for_no_device(cuda, monkeypatch):
    """A collective that never ends would keep the process."""
    tensor = pinned()
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del tensor
    gc.collect()
    assert len(cuda.calls) == 1


def test_an_error_of_the_device_leaves_the_end_as_it_is(cuda, monkeypatch):
    """After an illegal access, say, every call of CUDA raises."""

    def fails(_device: int) -> None:
        cuda.calls.append(("synchronize",))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    tensor = pinned()
    address = kernels.address(tensor)
    del tensor
    gc.collect()
    assert [call[0] for call in cuda.calls] == ["register", "synchronize"]
    assert not is_mapped(address, mmap.PAGESIZE)
