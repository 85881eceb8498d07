"""The device that programs train on: the GPU if there is one, else the CPU."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch


class Accelerator:
    """What DeepSpeed's `get_accelerator()` answers, in terms of `torch.cuda` or of the CPU."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._name = "cuda" if is_cuda else "cpu"
        self._communication_backend_name = "nccl" if is_cuda else "gloo"
        self._compile_backend = "inductor"

    def __getattr__(self, name: str) -> Any:
        """What `torch.cuda` has under the same name, where there is a GPU.

        Raises:
            AttributeError: it has no such name, or there is no GPU.
        """
        if not name.startswith("_") and self._is_cuda and hasattr(torch.cuda, name):
            return getattr(torch.cuda, name)
        raise AttributeError(
            f"get_accelerator().{name} is not there for {self._name}: use torch.{'cuda' if self._is_cuda else 'cpu'}"
        )

    # -- which device

    def device_name(self, device_index: int | None = None) -> str:
        """cpu, cuda or cuda:0."""
        return self._name if device_index is None or not self._is_cuda else f"cuda:{device_index}"

    def current_device(self) -> int | str:
        """The number of the GPU in use, or "cpu"."""
        return torch.cuda.current_device() if self._is_cuda else "cpu"

    def current_device_name(self) -> str:
        """cpu or cuda:0."""
        return f"cuda:{torch.cuda.current_device()}" if self._is_cuda else "cpu"

    def device_count(self) -> int:
        """GPUs that this process sees; for CPUs, the ranks of this host."""
        return torch.cuda.device_count() if self._is_cuda else int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def set_device(self, device_index: Any) -> None:
        """Makes a GPU the current one; nothing on the CPU."""
        if self._is_cuda:
            torch.cuda.set_device(device_index)

    def is_available(self) -> bool:
        """Always."""
        return True

    def communication_backend_name(self) -> str:
        """nccl or gloo."""
        return self._communication_backend_name

    def is_synchronized_device(self) -> bool:
        """Whether work is done when a call returns: on the CPU."""
        return not self._is_cuda

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on this device."""
        return tensor.device.type == self._name

    def device(self, device_index: Any = None) -> Any:
        """A block with this GPU as the current one."""
        return torch.cuda.device(device_index) if self._is_cuda else nullcontext()

    # -- order of work

    def synchronize(self, device_index: Any = None) -> None:
        """Waits for the GPU."""
        if self._is_cuda:
            torch.cuda.synchronize(device_index)

    def stream(self, stream: Any) -> Any:
        """A block whose work goes to a stream of the GPU."""
        return torch.cuda.stream(stream) if self._is_cuda else nullcontext()

    # -- random numbers

    def manual_seed(self, seed: int) -> None:
        """Seeds this device."""
        torch.cuda.manual_seed(seed) if self._is_cuda else torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seeds all devices of this kind."""
        torch.cuda.manual_seed_all(seed) if self._is_cuda else torch.manual_seed(seed)

    def initial_seed(self) -> int:
        """The seed that was given."""
        return torch.cuda.initial_seed() if self._is_cuda else torch.initial_seed()

    def get_rng_state(self, device_index: Any = None) -> torch.Tensor:
        """The state of this device's generator."""
        if self._is_cuda:
            return torch.cuda.get_rng_state("cuda" if device_index is None else device_index)
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: Any = None) -> None:
        """Puts this device's generator into a state."""
        if self._is_cuda:
            torch.cuda.set_rng_state(new_state, "cuda" if device_index is None else device_index)
        else:
            torch.set_rng_state(new_state)

    # -- memory, in bytes

    def empty_cache(self) -> None:
        """Gives cached memory of the GPU back."""
        if self._is_cuda:
            torch.cuda.empty_cache()

    def memory_allocated(self, device_index: Any = None) -> int:
        """Of tensors on the GPU; of this process on the CPU."""
        return torch.cuda.memory_allocated(device_index) if self._is_cuda else _resident_bytes("VmRSS")

    def max_memory_allocated(self, device_index: Any = None) -> int:
        """The most that there was."""
        return torch.cuda.max_memory_allocated(device_index) if self._is_cuda else _resident_bytes("VmHWM")

    def reset_peak_memory_stats(self, device_index: Any = None) -> None:
        """The most on the GPU is counted from now on; the CPU's is that of the process's life."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device_index)

    def total_memory(self, device_index: Any = None) -> int:
        """Of the device."""
        if self._is_cuda:
            return int(torch.cuda.get_device_properties(device_index or 0).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: Any = None) -> int:
        """What can be allocated."""
        if self._is_cuda:
            return self.total_memory(device_index) - self.memory_allocated(device_index)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """A copy in pinned memory; on the CPU the tensor itself."""
        return tensor.pin_memory() if self._is_cuda else tensor

    # -- number formats and compilation

    def supported_dtypes(self) -> list[torch.dtype]:
        """What models are trained in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    def is_bf16_supported(self) -> bool:
        """Whether models are trained in bfloat16."""
        return torch.cuda.is_bf16_supported() if self._is_cuda else True

    def is_fp16_supported(self) -> bool:
        """Whether models are trained in float16."""
        return True

    def get_compile_backend(self) -> str:
        """That of torch.compile."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """What `get_compile_backend()` answers from now on."""
        self._compile_backend = backend

    # -- ranges in a profile

    def range_push(self, message: str) -> Any:
        """Begins a range of NVTX; nothing on the CPU."""
        return torch.cuda.nvtx.range_push(message) if self._is_cuda else None  # type: ignore[no-untyped-call]

    def range_pop(self) -> Any:
        """Ends a range of NVTX; nothing on the CPU."""
        return torch.cuda.nvtx.range_pop() if self._is_cuda else None  # type: ignore[no-untyped-call]


@cache
def get_accelerator() -> Accelerator:
    """The one of this process."""
    return Accelerator(is_cuda=torch.cuda.is_available())


def _resident_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith(f"{key}:")), 0)
