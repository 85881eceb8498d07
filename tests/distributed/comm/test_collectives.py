"""One contract for all transports: reductions, gathers, broadcasts, and what only shared memory promises."""

from __future__ import annotations

import pytest
import torch
from every_transport import (
    LARGE_NUMEL,
    ONE_HOST,
    REDUCTIONS,
    SLICED_DTYPES,
    SMALL_BYTES,
    assert_reduced,
    buffers_for,
    cases,
    communicator_on,
    every_transport,
    neighbours,
    reduced,
    same,
    values_of,
)
from partita.comm import (
    Reduction,
)
from torch import Tensor

# -- reductions


def _all_reduces(hosts: tuple[str, ...]) -> list[Tensor]:
    results = []
    with communicator_on(hosts) as communicator:
        for dtype, reduction, numel in cases(communicator, (*SLICED_DTYPES, torch.float64)):
            own = values_of(communicator.rank, numel, dtype)
            expected = reduced(communicator.world_size, numel, dtype, reduction)
            for where, buffer, around in buffers_for(communicator, own, numel == LARGE_NUMEL):
                what = f"{reduction} of {numel} {dtype} in {where}"
                communicator.all_reduce(buffer, reduction).wait()
                assert_reduced(communicator, buffer, expected, what)
                assert (neighbours(buffer, around) == -77).all(), what
                results.append(buffer[:100].clone())
    return results


@every_transport
def test_all_reduce(ranks, hosts):
    """Every size around the limits, every dtype, in memory of all sorts; the same bits on all ranks."""
    first, *others = ranks(len(hosts)).run(_all_reduces, hosts)
    for results in others:
        assert all(map(torch.equal, results, first))


def _reduce_scatters(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        for dtype, reduction, numel in cases(communicator, SLICED_DTYPES):
            numel *= communicator.world_size if numel != LARGE_NUMEL else 1
            numel -= numel % communicator.world_size
            own = values_of(communicator.rank, numel, dtype)
            expected = communicator.slice_of(reduced(communicator.world_size, numel, dtype, reduction))
            for where, buffer, around in buffers_for(communicator, own, numel > LARGE_NUMEL // 2):
                what = f"{reduction} of {numel} {dtype} in {where}"
                communicator.reduce_scatter(buffer, reduction).wait()
                assert_reduced(communicator, communicator.slice_of(buffer), expected, what)
                assert (neighbours(buffer, around) == -77).all(), what


@every_transport
def test_reduce_scatter(ranks, hosts):
    """The own slice is the reduction; what lies around the buffer stays."""
    ranks(len(hosts)).run(_reduce_scatters, hosts)


def _default_reduction(hosts: tuple[str, ...]) -> list[list[float]]:
    with communicator_on(hosts) as communicator:
        buffers = [torch.full((communicator.world_size,), float(communicator.rank + 1)) for _ in range(2)]
        communicator.all_reduce(buffers[0]).wait()
        communicator.reduce_scatter(buffers[1]).wait()
        return [buffers[0].tolist(), communicator.slice_of(buffers[1]).tolist()]


@every_transport
def test_sums_are_the_default(ranks, hosts):
    """Sums of whole numbers are exact on every transport."""
    n = len(hosts)
    total = float(n * (n + 1) // 2)
    assert ranks(n).run(_default_reduction, hosts) == [[[total] * n, [total]]] * n


# -- copies

COPIED_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")
SHAPES = [(), (0,), (1,), (3, 5), (4, 0, 2), (70_001,)]


def _bytes_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """0s and 1s, which every dtype has."""
    bits = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(rank + 1))
    return bits.to(dtype)


def _all_gathers(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        n = communicator.world_size
        for name in COPIED_DTYPES[:6]:
            dtype = getattr(torch, name)
            for part in (0, 1, 7, SMALL_BYTES // n // dtype.itemsize, 70_001):
                expected = torch.cat([_bytes_of(r, (part,), dtype) for r in range(n)])
                own = torch.zeros(n * part, dtype=dtype)
                communicator.slice_of(own).copy_(_bytes_of(communicator.rank, (part,), dtype))
                for where, buffer, around in buffers_for(communicator, own, name == "uint8"):
                    communicator.all_gather(buffer).wait()
                    assert same(buffer, expected), f"{n} x {part} {dtype} in {where}"
                    assert (neighbours(buffer, around) == torch.tensor(-77).to(dtype)).all()


@every_transport
def test_all_gather(ranks, hosts):
    """Every slice is its rank's."""
    ranks(len(hosts)).run(_all_gathers, hosts)


def _broadcasts(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        for root in range(communicator.world_size):
            for name in COPIED_DTYPES:
                for shape in SHAPES:
                    dtype = getattr(torch, name)
                    tensor = _bytes_of(communicator.rank, shape, dtype)
                    communicator.broadcast(tensor, root).wait()
                    assert same(tensor, _bytes_of(root, shape, dtype)), f"{shape} {dtype} from rank {root}"
            own = communicator.empty(5000, torch.float32).fill_(communicator.rank)
            communicator.broadcast(own[1000:4000], root).wait()
            assert (own[1000:4000] == root).all()
            assert (own[:1000] == communicator.rank).all()
            assert (own[4000:] == communicator.rank).all()


@every_transport
def test_broadcast(ranks, hosts):
    """Any dtype and shape, from every rank, into all sorts of memory."""
    ranks(len(hosts)).run(_broadcasts, hosts)


# -- what only shared memory promises


def _scattered_doubles(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        n = communicator.world_size
        for numel in (3 * n, 5000 * n):
            for reduction in REDUCTIONS:
                buffer = values_of(communicator.rank, numel, torch.float64).clone()
                communicator.reduce_scatter(buffer, reduction).wait()
                expected = reduced(n, numel, torch.float64, reduction)
                assert torch.equal(communicator.slice_of(buffer), communicator.slice_of(expected))


def _nans(hosts: tuple[str, ...]) -> list[bool]:
    with communicator_on(hosts) as communicator:
        found = []
        for numel in (5, 5000):
            for dtype in SLICED_DTYPES:
                buffer = torch.zeros(numel, dtype=dtype)
                if communicator.rank == 0:
                    buffer[3] = float("nan")
                communicator.all_reduce(buffer, Reduction.max).wait()
                found.append(bool(buffer[3].isnan()) and int(buffer.isnan().sum()) == 1)
    return found


@pytest.mark.parametrize("world_size", ONE_HOST)
def test_shared_memory_keeps_doubles_and_nans(ranks, world_size):
    """Doubles are summed as doubles; a NaN on one rank is one in the maximum of all."""
    ranks(world_size).run(_scattered_doubles, ONE_HOST[world_size])
    assert all(all(found) for found in ranks(world_size).run(_nans, ONE_HOST[world_size]))


def _cut_differently(hosts: tuple[str, ...]) -> None:
    """An all-reduce has the bits of a reduce-scatter and an all-gather, whole and in pieces."""
    with communicator_on(hosts) as communicator:
        n, rank = communicator.world_size, communicator.rank
        for dtype in SLICED_DTYPES:
            whole, scattered, pieces = (values_of(rank, 12 * 1000, dtype).clone() for _ in range(3))
            communicator.all_reduce(whole, Reduction.average).wait()
            communicator.reduce_scatter(scattered, Reduction.average).wait()
            communicator.all_gather(scattered).wait()
            for handle in [communicator.all_reduce(piece, Reduction.average) for piece in pieces.split(12 * 77)]:
                handle.wait()
            assert torch.equal(whole, scattered), (n, dtype)
            assert torch.equal(whole, pieces), (n, dtype)


@pytest.mark.parametrize("world_size", ONE_HOST)
def test_over_shared_memory_bits_do_not_depend_on_how_buffers_are_cut(ranks, world_size):
    """Why all stages train the same bits on any number of ranks."""
    ranks(world_size).run(_cut_differently, ONE_HOST[world_size])
