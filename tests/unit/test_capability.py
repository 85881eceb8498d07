"""Which GPUs and drivers the native kernels are refused on, in which words; and that kernels are loaded first."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from partita import _core
from partita.device import capability, streams
from partita.device.capability import Gpu, prepare_kernels, why_not_loaded, why_unusable
from partita.device.streams import streams_of
from partita.run import run

H100 = Gpu("'cuda:1' (NVIDIA H100)", (9, 0), driver=13000, runtime=13000, architectures="80-real;90-real;100")


@pytest.mark.parametrize(
    "gpu",
    [
        H100,
        replace(H100, driver=13010),
        replace(H100, driver=12020, runtime=12080),  # any minor version of the driver's major one
        replace(H100, driver=13000, runtime=12080),
        replace(H100, driver=12010, runtime=12010),
        replace(H100, capability=(8, 0)),
        replace(H100, capability=(12, 1)),
    ],
)
def test_what_runs_is_not_refused(gpu):
    assert why_unusable(gpu) is None


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (replace(H100, driver=12080), ["'cuda:1'", "H100", "supports CUDA 12.8", "made with CUDA 13.0"]),
        (replace(H100, driver=12080), ["driver 580 or newer", "nvcc of CUDA 12"]),
        (replace(H100, driver=11080, runtime=12090), ["supports CUDA 11.8", "made with CUDA 12.9", "driver 525"]),
        (replace(H100, driver=13000, runtime=14020), ["supports CUDA 13.0", "made with CUDA 14.2", "for CUDA 14"]),
        (replace(H100, driver=0), ["supports CUDA 0.0", "driver 580"]),
        (replace(H100, driver=12000, runtime=12080), ["supports CUDA 12.0", "need 12.1", "530"]),
        (replace(H100, capability=(7, 5)), ["compute capability 7.5", "8.0 or newer", "CPU"]),
        (replace(H100, capability=(7, 5), driver=12000), ["supports CUDA 12.0"]),  # the driver first
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_what_to_do(gpu, words):
    reason = why_unusable(gpu) or ""
    assert not [word for word in words if word not in reason], reason


@pytest.mark.parametrize(
    ("gpu", "error", "words"),
    [
        (
            replace(H100, architectures="80-virtual"),
            "load_cuda_kernels: cudaFuncGetAttributes failed: cudaErrorUnsupportedPtxVersion (the provided PTX ...)",
            ["code for 80-virtual", "supports CUDA 13.0", "update the driver", "CMAKE_CUDA_ARCHITECTURES=90-real"],
        ),
        (
            replace(H100, capability=(12, 0), architectures="80-real;90-real"),
            "load_cuda_kernels: cudaFuncGetAttributes failed: cudaErrorNoKernelImageForDevice (no kernel image ...)",
            ["12.0", "code for 80-real;90-real", "=120-real", "CUDA 12.8", "pip install . -C cmake.define"],
        ),
        (H100, "cudaErrorInvalidDeviceFunction", ["=90-real", "CUDA 12.1"]),
        (H100, "cudaErrorMemoryAllocation (out of memory)", ["could not be loaded", "H100", "out of memory"]),
    ],
)
def test_kernels_that_cannot_be_loaded_are_explained(gpu, error, words):
    reason = why_not_loaded(gpu, error)
    assert not [word for word in words if word not in reason], reason


@pytest.fixture
def gpu_of_tests(monkeypatch):
    """A GPU and a build for it, as far as `streams_of` asks; returns what was loaded."""
    loaded: list[int] = []

    def load(index: int) -> int:
        loaded.append(index)
        return 72

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(_core, "built_with_cuda", lambda: True)
    monkeypatch.setattr(_core, "cuda_versions", lambda: (13000, 12080))
    monkeypatch.setattr(_core, "cuda_architectures", lambda: "80-real;90")
    monkeypatch.setattr(_core, "load_cuda_kernels", load)
    monkeypatch.setattr(streams, "CudaStreams", lambda device: f"streams of {device}")
    prepare_kernels.cache_clear()
    yield loaded
    prepare_kernels.cache_clear()


def test_the_kernels_are_loaded_when_streams_are_made_and_once(gpu_of_tests):
    for device in (torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cuda")):
        assert streams_of(device) == f"streams of {device}"
    assert gpu_of_tests == [1, 0, 3]


def test_a_gpu_that_cannot_run_is_refused_before_its_kernels_are_loaded(gpu_of_tests, monkeypatch):
    monkeypatch.setattr(_core, "cuda_versions", lambda: (12040, 13000))
    with pytest.raises(RuntimeError, match=r"driver of 'cuda:1' \(NVIDIA H100\) supports CUDA 12\.4"):
        streams_of(torch.device("cuda", 1))
    assert gpu_of_tests == []


def test_kernels_that_are_not_loaded_are_an_error_each_time(gpu_of_tests, monkeypatch):
    def fail(index: int) -> int:
        raise RuntimeError("load_cuda_kernels: cudaFuncGetAttributes failed: cudaErrorNoKernelImageForDevice (...)")

    monkeypatch.setattr(_core, "load_cuda_kernels", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has code for 80-real;90: build it again") as error:
            streams_of(torch.device("cuda", 1))
        assert "cudaFuncGetAttributes" in str(error.value.__cause__)


def test_a_build_without_cuda_says_so():
    if _core.built_with_cuda():
        pytest.skip("this build has CUDA code")
    assert _core.cuda_versions() == (0, 0)
    assert _core.cuda_architectures() == ""
    with pytest.raises(RuntimeError, match="no CUDA code"):
        _core.load_cuda_kernels(0)


def test_every_known_major_version_has_a_driver():
    assert all(driver.isdigit() for driver in capability.DRIVERS.values())
    assert capability.OLDEST_DRIVER // 1000 in capability.DRIVERS


def test_the_gpu_of_a_run_is_the_current_one_before_its_kernels_are_loaded(monkeypatch):
    """Who loads them on another one than the current one makes that current again, which takes memory there."""
    calls: list[str] = []

    def streams_of(device: torch.device) -> None:
        calls.append(f"streams of {device}")
        raise RuntimeError("enough")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"current {device}"))
    monkeypatch.setattr(run, "streams_of", streams_of)
    with ExitStack() as exits, pytest.raises(RuntimeError, match=r"^enough$"):
        run.begin_run({"train_batch_size": 1}, torch.device("cuda", 1), exits)
    assert calls == ["current cuda:1", "streams of cuda:1"]
