"""All transports, and what a reduction must give on each of them.

The expected sum is in rank order. Shared memory promises those bits; elsewhere the order, and where 16-bit sums are
rounded, is the transport's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache

import inside
import pytest
import torch
import torch.distributed as dist
from partita.comm import (
    Communicator,
    HierarchicalCommunicator,
    Reduction,
    SharedMemoryCommunicator,
    TorchCommunicator,
    communicator_of,
)
from torch import Tensor

TIMEOUT = timedelta(seconds=30)
SMALL_BYTES = 8192  # up to this size, shared memory sends values along with the announcement
LARGE_NUMEL = 1_000_003
REDUCTIONS = (Reduction.sum, Reduction.average, Reduction.max)
SLICED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of reduce_scatter
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# What ranks communicate through: for each rank the host that it believes to be on, "" for torch, or WHOLE for torch
# with the backend's own collectives, as over NCCL.
WHOLE = "whole"
TORCH = {n: ("",) * n for n in (2, 3, 4)}
ONE_HOST = {n: ("a",) * n for n in (2, 3, 4)}
TWO_HOSTS = {"2+2": tuple("aabb"), "interleaved": tuple("abab"), "2+1": tuple("aab"), "1+2 interleaved": tuple("aba")}
TRANSPORTS = {f"torch, {n} ranks": hosts for n, hosts in TORCH.items()}
TRANSPORTS |= {f"whole collectives, {n} ranks": (WHOLE,) * n for n in (2, 3)}
TRANSPORTS |= {f"shared memory, {n} ranks": hosts for n, hosts in ONE_HOST.items()}
TRANSPORTS |= {f"two hosts, {name}": hosts for name, hosts in TWO_HOSTS.items()}

every_transport = pytest.mark.parametrize(
    "hosts",
    [pytest.param(hosts, marks=pytest.mark.slow if hosts == (WHOLE,) * 2 else ()) for hosts in TRANSPORTS.values()],
    ids=TRANSPORTS,
)


@contextmanager
def communicator_on(hosts: tuple[str, ...]) -> Iterator[Communicator]:
    group = dist.group.WORLD
    assert group is not None
    host = hosts[dist.get_rank()].removeprefix(WHOLE)
    with inside.whole_collectives() if WHOLE in hosts else nullcontext():
        made = communicator_of(group, "auto" if host else "torch", TIMEOUT, host=host or None)
    kinds = {0: SharedMemoryCommunicator, 1: HierarchicalCommunicator}
    assert type(made) is (kinds[len(set(hosts)) - 1] if host else TorchCommunicator)
    yield made
    made.barrier()
    made.close()


@cache
def values_of(rank: int, numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """What a rank contributes; other ranks can tell."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


@cache
def reduced(world_size: int, numel: int, dtype: torch.dtype, reduction: Reduction, seed: int = 0) -> Tensor:
    """In rank order, in fp32 (fp64 for float64), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = values_of(0, numel, dtype, seed).to(wide)
    for rank in range(1, world_size):
        value = values_of(rank, numel, dtype, seed).to(wide)
        total = torch.maximum(total, value) if reduction == Reduction.max else total + value
    if reduction == Reduction.average:
        total = total / world_size if wide == torch.float64 else total * (torch.ones(()) / world_size)
    return total.to(dtype)


def buffers_for(communicator: Communicator, values: Tensor, large: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(where it lies, a flat buffer that holds the values, a larger one around it) in all sorts of memory."""
    numel, dtype = values.numel(), values.dtype
    make: dict[str, Callable[[int], Tensor]] = {
        "memory of empty()": lambda n: communicator.empty(n, dtype),
        "foreign memory": lambda n: torch.empty(n, dtype=dtype),
    }
    for where, empty in make.items():
        for before, after in [(0, 0)] if large else [(0, 0), (1, 2)]:
            around = empty(before + numel + after).fill_(-77)
            buffer = around[before : before + numel]
            buffer.copy_(values)
            yield f"{where}, from element {before}", buffer, around


def neighbours(buffer: Tensor, around: Tensor) -> Tensor:
    before = buffer.storage_offset() - around.storage_offset()
    return torch.cat([around[:before], around[before + buffer.numel() :]])


def sizes(dtype: torch.dtype) -> list[int]:
    limit = SMALL_BYTES // dtype.itemsize
    return [0, 1, 2, 7, limit - 1, limit, limit + 1, 3 * limit + 5]


def assert_reduced(communicator: Communicator, result: Tensor, expected: Tensor, what: str) -> None:
    if isinstance(communicator, SharedMemoryCommunicator):
        assert torch.equal(result, expected), what
    else:
        tolerance = TOLERANCES[result.dtype]
        torch.testing.assert_close(
            result, expected, rtol=tolerance, atol=tolerance, msg=lambda message: f"{what}: {message}"
        )


def cases(communicator: Communicator, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[torch.dtype, Reduction, int]]:
    """All of them for shared memory. Gloo takes its time: there, every dtype, reduction and size at least once."""
    ours = isinstance(communicator, SharedMemoryCommunicator)
    for i, dtype in enumerate(dtypes):
        for j, reduction in enumerate(REDUCTIONS):
            few = sizes(dtype)[(i + j) % 3 :: 3]
            yield from ((dtype, reduction, numel) for numel in (sizes(dtype) if ours else few))
    yield from ((dtype, Reduction.average, LARGE_NUMEL) for dtype in dtypes if ours or dtype == torch.float32)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
