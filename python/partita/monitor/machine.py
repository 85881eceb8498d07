"""What a device has: its memory in use, and how fast it can compute."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

_PAGE_BYTES = resource.getpagesize()
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # of the unit of ru_maxrss

# Dense products of 16-bit matrices, in 10^12 operations per second, as the makers state them.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 150.0),
    ("RTX A6000", 155.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory in use now and at most so far: of torch's allocator on a GPU, of this process on the CPU."""
    if device.type == "cuda":
        stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device)
        allocated = stats.get("allocated_bytes", {}).get("all", {"current": 0, "peak": 0})
        return {"memory_now_bytes": allocated["current"], "memory_peak_bytes": allocated["peak"]}
    result: dict[str, int] = {}
    try:
        with open("/proc/self/statm", "rb") as file:
            result["memory_now_bytes"] = int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
    return result | {"memory_peak_bytes": max(peak, *result.values(), 0)}  # the system counts the peak now and then


def peak_flops_of(name: str) -> float | None:
    """Operations per second of a GPU of this name, in 16 bits; None: not known."""
    words = name.split()
    for known, tflops in _PEAK_TFLOPS:
        if all(any(word == part or word.startswith(part + "-") for word in words) for part in known.split()):
            return tflops * 1e12
    return None
