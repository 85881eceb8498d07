"""Whether a GPU and its driver can run the native kernels, and what to do where they cannot; loading the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from partita import _core

OLDEST_CAPABILITY = (8, 0)
OLDEST_DRIVER = 12010  # kernels with arguments of more than 4 KB
# By major version of CUDA: the first driver that runs what is built with any of its minor versions.
DRIVERS = {11: "450", 12: "525", 13: "580"}
DRIVER_OF_OLDEST = "530"
FIRST_BLACKWELL = (10, 0)
# What CUDA answers where a build has no code for a GPU, and where a driver cannot compile the PTX of a build.
NO_CODE = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction")
NEWER_PTX = ("cudaErrorUnsupportedPtxVersion", "cudaErrorJitCompilerNotFound", "cudaErrorJitCompilationDisabled")


@dataclass(frozen=True)
class Gpu:
    """What is known of a GPU before anything runs on it. Versions of CUDA are 1000 x major + 10 x minor.

    Attributes:
        name: for people.
        capability: compute capability.
        driver: the version of CUDA that the driver supports.
        runtime: the version of CUDA that the native core was built with.
        architectures: what the native core was built for, as CMAKE_CUDA_ARCHITECTURES has it.
    """

    name: str
    capability: tuple[int, int]
    driver: int
    runtime: int
    architectures: str


def why_unusable(gpu: Gpu) -> str | None:
    """What stands against a GPU or its driver, and what to do; None: nothing that can be said before kernels are
    loaded."""
    built = gpu.runtime // 1000
    if gpu.driver // 1000 < built:
        driver = DRIVERS.get(built, f"for CUDA {built}")
        return (
            f"the driver of {gpu.name} supports CUDA {_version(gpu.driver)}, and this build of Partita was made with "
            f"CUDA {_version(gpu.runtime)}, which needs driver {driver} or newer: update the driver, or build Partita "
            f"again with an nvcc of CUDA {gpu.driver // 1000}"
        )
    if gpu.driver < OLDEST_DRIVER:
        return (
            f"the driver of {gpu.name} supports CUDA {_version(gpu.driver)}, and the kernels need "
            f"{_version(OLDEST_DRIVER)}: update the driver to {DRIVER_OF_OLDEST} or newer"
        )
    if gpu.capability < OLDEST_CAPABILITY:
        return (
            f"{gpu.name} has compute capability {_capability(gpu)}, and the kernels need 8.0 or newer (Ampere, Ada, "
            "Hopper, Blackwell): use another GPU, or move the model to the CPU"
        )
    return None


def why_not_loaded(gpu: Gpu, error: str) -> str:
    """The same for kernels that could not be loaded, from what CUDA answered."""
    again = (
        f"build it again for it, with {_toolkit(gpu)}: pip install . "
        f"-C cmake.define.CMAKE_CUDA_ARCHITECTURES={gpu.capability[0]}{gpu.capability[1]}-real"
    )
    built_for = f"this build of Partita has code for {gpu.architectures or 'no GPU that it names'}"
    if any(name in error for name in NO_CODE):
        return f"{gpu.name} has compute capability {_capability(gpu)}, and {built_for}: {again}"
    if any(name in error for name in NEWER_PTX):
        return (
            f"{gpu.name} has compute capability {_capability(gpu)}; {built_for}, and its driver, which supports CUDA "
            f"{_version(gpu.driver)}, cannot compile that of CUDA {_version(gpu.runtime)} for it: update the driver, "
            f"or {again}"
        )
    return f"the kernels could not be loaded on {gpu.name}: {error}"


@cache
def prepare_kernels(device: torch.device) -> None:
    """Makes sure that the native kernels run on a CUDA device, and loads all of them there.

    CUDA loads a kernel at its first launch else, which may wait for kernels that run: those of a collective might in
    turn wait for this rank.

    Raises:
        RuntimeError: driver, GPU and build do not fit together. The message says what was found, what is needed and
            what to do.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    name = f"'{device}' ({torch.cuda.get_device_name(index)})"
    gpu = Gpu(name, torch.cuda.get_device_capability(index), *_core.cuda_versions(), _core.cuda_architectures())
    if (reason := why_unusable(gpu)) is not None:
        raise RuntimeError(reason)
    try:
        _core.load_cuda_kernels(index)
    except RuntimeError as error:
        raise RuntimeError(why_not_loaded(gpu, str(error))) from error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _capability(gpu: Gpu) -> str:
    return f"{gpu.capability[0]}.{gpu.capability[1]}"


def _toolkit(gpu: Gpu) -> str:
    """Which nvcc knows a GPU."""
    needed = "12.8" if gpu.capability >= FIRST_BLACKWELL else _version(OLDEST_DRIVER)
    return f"an nvcc of CUDA {needed} or newer that the driver supports"
