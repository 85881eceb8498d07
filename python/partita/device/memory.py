"""Memory for flat buffers."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HOST = torch.device("cpu")
FREED_LIMIT_BYTES = 16 << 20  # after freeing so much, FreedMemory returns it to the system


def flat_buffer(numel: int, dtype: torch.dtype, device: torch.device = HOST) -> Tensor:
    """A zero-filled flat tensor; on the host in pages of its own.

    Pages are committed when they are first touched, huge where the system grants it (a step walks through gigabytes,
    and small pages cost it address translations), and go back to the system with the tensor. In malloc's heap,
    long-lived buffers between short-lived gradients would keep the memory of both.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0 or device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def host_buffer(numel: int, dtype: torch.dtype, pin: bool) -> Tensor:
    """A zero-filled flat tensor on the host; `pin`: where there is a GPU, in memory that it copies from and to by
    itself."""
    if pin and torch.cuda.is_available():
        return torch.zeros(numel, dtype=dtype, device=HOST, pin_memory=True)
    return flat_buffer(numel, dtype)


class FreedMemory:
    """Memory that was given back to malloc, which keeps it, in pieces between what lives on.

    Building a model frees as much as the model has. Every now and then malloc's free pages are returned to the system,
    where malloc can do that (glibc).
    """

    def __init__(self) -> None:
        self._freed_bytes = 0

    def add(self, nbytes: int) -> None:
        """So much was freed."""
        self._freed_bytes += nbytes
        if self._freed_bytes >= FREED_LIMIT_BYTES:
            self.give_back()

    def give_back(self) -> None:
        """Returns what malloc has to the system."""
        self._freed_bytes = 0
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
