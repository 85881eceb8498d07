"""Time, memory and copy bandwidth of a device: CUDA events on a GPU, the host's clock on the CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """ms per call of `work`, called `times` times in a row on a device that has nothing else to do."""
    synchronize(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begin) * 1e3 / times
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / times


def host_ms(device: torch.device, work: Callable[[], object]) -> float:
    """ms until `work` returns; the device is idle before it and not waited for after it."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def copy_gb_per_s(device: torch.device, nbytes: int, times: int = 10, rounds: int = 3) -> float:
    """Bytes read and written by a copy of `nbytes` inside the device's memory, per second."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    ms = median(elapsed_ms(device, lambda: target.copy_(source), times) for _ in range(rounds))
    return 2 * source.numel() * 4 / ms / 1e6


def release(device: torch.device) -> None:
    """Gives what nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most that tensors took, and that torch's allocator held, since `reset_peak`; empty on the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know of the device to judge the figures."""
    if device.type != "cuda":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
