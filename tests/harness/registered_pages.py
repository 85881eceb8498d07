"""A machine with a GPU, as far as pinned memory sees it: records what is registered with CUDA, and looks whether it is
mapped then. What is not replaced raises, as this torch has no CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

SUCCESS, NO_MEMORY = 0, 2  # of cudaError_t
DEVICE = 3


def is_mapped(address: int, nbytes: int) -> bool:
    """Whether all of this range of addresses is mapped."""
    end = address + nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            address = last
    return address >= end


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that has this address: "dc" for one that children do not get."""
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, last = (int(part, 16) for part in words[0].split("-"))
            inside = first <= address < last
        elif inside and words[0] == "VmFlags:":
            flags = words[1:]
    return flags


class Runtime:
    """Stands in for `torch.cuda.cudart()`.

    calls: what was asked, in order: ("register", address, bytes), ("synchronize", device), ("unregister", address),
    and "launch" for work on the device.
    """

    def __init__(self) -> None:
        self.cudart = SimpleNamespace(
            cudaError=SimpleNamespace(success=SUCCESS),
            cudaHostRegister=self._register,
            cudaHostUnregister=self._unregister,
            cudaGetErrorString=lambda code: f"error {code}",
        )
        self.calls: list[tuple[Any, ...]] = []
        self.answer = SUCCESS  # of the next registrations
        self.has_error = False  # that the next launch would raise
        self._sizes: dict[int, int] = {}

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1, "not pinned for every context"
        assert is_mapped(address, nbytes), "pages are registered that are not mapped"
        self.calls.append(("register", address, nbytes))
        if self.answer == SUCCESS:
            assert address not in self._sizes
            self._sizes[address] = nbytes
        self.has_error |= self.answer != SUCCESS
        return self.answer

    def _unregister(self, address: int) -> int:
        mapped = is_mapped(address, self._sizes.pop(address))
        self.calls.append(("unregister", address) if mapped else ("unregister when it was unmapped", address))
        return SUCCESS

    @property
    def registered_bytes(self) -> int:
        return sum(self._sizes.values())

    def launch(self) -> None:
        """Some kernel, which raises what the runtime has kept."""
        self.calls.append(("launch",))
        error, self.has_error = self.has_error, False
        if error:
            raise RuntimeError("CUDA error: out of memory")


@contextmanager
def registered_pages() -> Iterator[Runtime]:
    """In this block pinned memory believes that there is CUDA."""
    runtime, empty = Runtime(), torch.empty

    def empty_of(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            assert torch.device(device).index == DEVICE
            return SimpleNamespace(fill_=lambda _value: runtime.launch())
        return empty(*args, device=device, **kwargs)

    with ExitStack() as patches:
        for name, replacement in {
            "cudart": lambda: runtime.cudart,
            "current_device": lambda: DEVICE,
            "device": lambda index: nullcontext(index),
            "synchronize": lambda device: runtime.calls.append(("synchronize", device)),
        }.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, replacement))
        patches.enter_context(mock.patch.object(torch, "empty", empty_of))
        yield runtime
