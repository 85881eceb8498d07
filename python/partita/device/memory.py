"""Memory for flat buffers."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from partita.device import kernels

HOST = torch.device("cpu")
FREED_LIMIT_BYTES = 16 << 20  # after freeing so much, FreedMemory returns it to the system
PAGES_FROM_BYTES = 64 << 10  # pinned buffers of so much have pages of their own
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process

logger = logging.getLogger("partita")

Pages = TypeVar("Pages", bound=mmap.mmap)
_OF_THE_PARENT: list[object] = []  # in a child: what must not be unmapped


def flat_buffer(numel: int, dtype: torch.dtype, device: torch.device = HOST) -> Tensor:
    """A zero-filled flat tensor; on the host in pages of its own.

    Pages are committed when they are first touched, huge where the system grants it (a step walks through gigabytes,
    and small pages cost it address translations), and go back to the system with the tensor. In malloc's heap,
    long-lived buffers between short-lived gradients would keep the memory of both.
    """
    nbytes = numel * dtype.itemsize
    if nbytes == 0 or device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.frombuffer(_huge(mmap.mmap(-1, nbytes, flags=_FLAGS)), dtype=dtype)


def host_buffer(numel: int, dtype: torch.dtype, pin: bool) -> Tensor:
    """A zero-filled flat tensor on the host.

    Args:
        pin: in memory that the GPU copies from and to by itself, see [Note: pinned pages]. Only for what belongs to a
            model on a GPU. Where that memory cannot be had, a warning says so, and the tensor is not pinned.
    """
    nbytes = numel * dtype.itemsize
    if not pin or nbytes == 0:
        return flat_buffer(numel, dtype)
    if nbytes < PAGES_FROM_BYTES:
        try:
            return torch.zeros(numel, dtype=dtype, device=HOST, pin_memory=True)
        except RuntimeError as error:
            _give_up_pinning(str(error).partition("\n")[0])
            return flat_buffer(numel, dtype)
    pages = _PinnedPages(nbytes)
    tensor = torch.frombuffer(pages, dtype=dtype)
    pages.register(kernels.address(tensor))
    return tensor


def _huge(pages: Pages) -> Pages:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class _PinnedPages(mmap.mmap):
    """Pages that are registered with CUDA as long as they are mapped.

    [Note: pinned pages]
    torch's allocator of pinned memory rounds every size up to a power of two and keeps what was freed. Buffers that
    live as long as an engine have pages of their own, which are registered with CUDA: the size is that of whole pages.
    torch asks CUDA whether memory is pinned, so it is for torch, too. Less than `PAGES_FROM_BYTES` is left to torch's
    allocator: what it loses there is little, and a registration is a call to the driver.

    The end. The tensor's storage owns this object. `__del__` runs before the pages are unmapped (a weak reference
    would be told afterwards). Copies that the host has queued may still be under way then: torch notes the copies of
    its own pinned memory only. So `__del__` waits for the device, then ends the registration. While Python ends it
    does neither: a collective that never ends must not keep the process, and the driver keeps the physical pages of a
    registration.

    A fork. The kernel copies registered pages into a child at once, for every worker of a DataLoader; older kernels may
    give the parent other pages than those that the GPU uses. So a child does not get these pages. It must not unmap
    their addresses either, where it may have something else by then.
    """

    def __new__(cls, nbytes: int) -> _PinnedPages:
        pages = _huge(super().__new__(cls, -1, nbytes, flags=_FLAGS))
        pages._owner = os.getpid()
        if hasattr(mmap, "MADV_DONTFORK"):
            pages.madvise(mmap.MADV_DONTFORK)
        return pages

    _owner = 0  # the process that has mapped them
    _address = 0  # 0: not registered
    _device = 0  # whose context has registered them

    def register(self, address: int) -> None:
        """The pages, which begin at this address, are pinned; a warning where that is not possible."""
        device, runtime = torch.cuda.current_device(), torch.cuda.cudart()  # type: ignore[no-untyped-call]
        nbytes = -(-len(self) // mmap.PAGESIZE) * mmap.PAGESIZE
        result = runtime.cudaHostRegister(address, nbytes, _PORTABLE)
        if result == runtime.cudaError.success:
            self._address, self._device = address, device
            return
        # CUDA also keeps the error for whoever asks next: the launch of some kernel, which would raise it. A launch of
        # our own asks first.
        with suppress(Exception):
            torch.empty(1, dtype=torch.uint8, device=torch.device("cuda", device)).fill_(0)
        _give_up_pinning(runtime.cudaGetErrorString(result))

    def __del__(self) -> None:
        if os.getpid() != self._owner:
            _OF_THE_PARENT.append(self)
        elif self._address and not sys.is_finalizing():
            address, self._address = self._address, 0
            with suppress(Exception), torch.cuda.device(self._device):  # after some errors CUDA does nothing any more
                torch.cuda.synchronize(self._device)
                torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


@cache
def _give_up_pinning(reason: str) -> None:
    """Says once that there is no more pinned memory, and why."""
    logger.warning(
        "host memory could not be pinned (%s): copies between the host and the GPU are slower, and the host waits for "
        "them. Is there a limit on locked memory (ulimit -l, of the container, WSL's)? pin_memory: false in "
        "offload_optimizer and offload_param asks for none",
        reason,
    )


class FreedMemory:
    """Memory that was given back to malloc, which keeps it, in pieces between what lives on.

    Building a model frees as much as the model has. Every now and then malloc's free pages are returned to the system,
    where malloc can do that (glibc).
    """

    def __init__(self) -> None:
        self._freed_bytes = 0

    def add(self, nbytes: int, device: torch.device) -> None:
        """So much was freed there. What a GPU frees is nothing to malloc."""
        self._freed_bytes += nbytes if device.type == "cpu" else 0
        if self._freed_bytes >= FREED_LIMIT_BYTES:
            self.give_back()

    def give_back(self) -> None:
        """Returns what malloc has to the system."""
        self._freed_bytes = 0
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
