"""What the tests on a GPU share: the devices, the marks that skip without one, and bits to compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():  # else products on several streams may differ in their bits, says cuBLAS
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Of a test whose parameter `device` is where the model is: without a GPU its code runs all the same, on the CPU.
on_both_devices = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=NEEDS_CUDA)]
)


def needs_cuda(test: Callable[..., Any]) -> Any:
    """Marks one test as one for a GPU."""
    for mark in NEEDS_CUDA:
        test = mark(test)
    return test


@contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """torch raises for whatever makes the host wait for the GPU; on the CPU nobody could tell."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)
