"""One contract for all transports: collectives, sends and receives, handles, errors.

Results are held against a sum in rank order. Shared memory promises those bits; elsewhere the order, and where 16-bit
sums are rounded, is the transport's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

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

# What ranks communicate through: for each rank the host that it believes to be on, or "" for torch.
TORCH = {n: ("",) * n for n in (2, 3, 4)}
ONE_HOST = {n: ("a",) * n for n in (2, 3, 4)}
TWO_HOSTS = {"2+2": tuple("aabb"), "interleaved": tuple("abab"), "2+1": tuple("aab"), "1+2 interleaved": tuple("aba")}
TRANSPORTS = {f"torch, {n} ranks": hosts for n, hosts in TORCH.items()}
TRANSPORTS |= {f"shared memory, {n} ranks": hosts for n, hosts in ONE_HOST.items()}
TRANSPORTS |= {f"two hosts, {name}": hosts for name, hosts in TWO_HOSTS.items()}

every_transport = pytest.mark.parametrize("hosts", TRANSPORTS.values(), ids=TRANSPORTS)


@contextmanager
def communicator_on(hosts: tuple[str, ...]) -> Iterator[Communicator]:
    group = dist.group.WORLD
    assert group is not None
    host = hosts[dist.get_rank()]
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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_raw(a), _raw(b))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


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
                    assert _same(buffer, expected), f"{n} x {part} {dtype} in {where}"
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
                    assert _same(tensor, _bytes_of(root, shape, dtype)), f"{shape} {dtype} from rank {root}"
            own = communicator.empty(5000, torch.float32).fill_(communicator.rank)
            communicator.broadcast(own[1000:4000], root).wait()
            assert (own[1000:4000] == root).all()
            assert (own[:1000] == communicator.rank).all()
            assert (own[4000:] == communicator.rank).all()


@every_transport
def test_broadcast(ranks, hosts):
    """Any dtype and shape, from every rank, into all sorts of memory."""
    ranks(len(hosts)).run(_broadcasts, hosts)


# -- between two ranks


def _message(sender: int, receiver: int, number: int) -> Tensor:
    dtype = (torch.float32, torch.int64, torch.bool, torch.bfloat16)[number % 4]
    shape = ((), (3, 5), (5000,), (40_000,), (0,), (1,))[number % 6]
    generator = torch.Generator().manual_seed(100 * sender + 10 * receiver + number)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


MESSAGES = 12


def _messages(hosts: tuple[str, ...]) -> None:
    """All to all, several under way, some out of memory of empty(); received in the order of the sends."""
    with communicator_on(hosts) as communicator:
        peers = [r for r in range(communicator.world_size) if r != communicator.rank]
        sends, receives = [], []
        for number in range(MESSAGES):
            for peer in peers:
                message = _message(communicator.rank, peer, number)
                if number % 2:
                    message = communicator.empty(message.numel(), message.dtype).copy_(message.reshape(-1))
                sends.append(communicator.send(message, peer))
        for number in range(MESSAGES):
            for peer in peers:
                expected = _message(peer, communicator.rank, number)
                got = torch.ones_like(expected)
                receives.append((communicator.recv(got, peer), got, expected))
        for handle, got, expected in reversed(receives):
            handle.wait()
            handle.wait()
            assert _same(got, expected)
        for handle in sends:
            handle.wait()
            handle.wait()


@every_transport
def test_messages_between_all_pairs(ranks, hosts):
    """In order, whatever is waited for first."""
    ranks(len(hosts)).run(_messages, hosts)


def _reused_buffers(hosts: tuple[str, ...]) -> None:
    """A pipeline: ranks hand values on, in buffers that are used again after each wait."""
    with communicator_on(hosts) as communicator:
        n, rank = communicator.world_size, communicator.rank
        outgoing, incoming = communicator.empty(3000, torch.float32), communicator.empty(3000, torch.float32)
        for step in range(20):
            outgoing.fill_(100 * step + rank)
            sent = communicator.send(outgoing, (rank + 1) % n)
            communicator.recv(incoming, (rank - 1) % n).wait()
            assert (incoming == 100 * step + (rank - 1) % n).all()
            sent.wait()


@every_transport
def test_buffers_are_free_after_the_wait(ranks, hosts):
    """No value of a later step in an earlier one."""
    ranks(len(hosts)).run(_reused_buffers, hosts)


# -- handles and order


def _many_in_flight(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        n, rank = communicator.world_size, communicator.rank
        under_way = []
        for i in range(100):  # more than have a place in shared memory
            numel = n * (11, 5000)[i % 2]
            own = values_of(rank, numel, torch.float32, i % 5)
            where = communicator.empty(numel, torch.float32) if i % 3 else torch.empty(numel)
            buffer = where.copy_(own)
            if i % 4 == 3:
                communicator.all_reduce(buffer)  # nobody waits
                del buffer, where
                continue
            collective = communicator.reduce_scatter if i % 4 == 1 else communicator.all_reduce
            under_way.append((collective(buffer), buffer, i))
        for handle, buffer, i in [*under_way[::-2], *under_way]:  # out of order, and again
            handle.wait()
            expected = reduced(n, buffer.numel(), torch.float32, Reduction.sum, i % 5)
            result = communicator.slice_of(buffer) if i % 4 == 1 else buffer
            expected = communicator.slice_of(expected) if i % 4 == 1 else expected
            assert_reduced(communicator, result, expected, f"collective {i}")


@every_transport
def test_handles_are_waited_for_in_any_order_twice_or_never(ranks, hosts):
    """Dropped ones do not disturb the rest."""
    ranks(len(hosts)).run(_many_in_flight, hosts)


def _waits_leave_results_alone(hosts: tuple[str, ...]) -> None:
    """A second wait returns at once: what the program wrote since stays."""
    with communicator_on(hosts) as communicator:
        for numel in (4, 40_000):
            for reduction in REDUCTIONS:
                for buffer in (communicator.empty(numel, torch.float32).fill_(1), torch.ones(numel)):
                    handle = communicator.all_reduce(buffer, reduction)
                    handle.wait()
                    buffer.fill_(5)
                    handle.wait()
                    assert (buffer == 5).all()


@every_transport
def test_a_second_wait_changes_nothing(ranks, hosts):
    """Averages are divided once, foreign memory is written once."""
    ranks(len(hosts)).run(_waits_leave_results_alone, hosts)


def _late_ranks(hosts: tuple[str, ...]) -> None:
    """Each rank is the late one in turn; nobody reads a buffer that a late rank still fills."""
    with communicator_on(hosts) as communicator:
        n, rank = communicator.world_size, communicator.rank
        buffer = communicator.empty(n * 4000, torch.float32)
        for step in range(2 * n):
            if step % n == rank:
                time.sleep(0.01)
            buffer.fill_(rank + 10 * step)
            communicator.reduce_scatter(buffer).wait()
            total = sum(r + 10 * step for r in range(n))
            assert (communicator.slice_of(buffer) == total).all()
            communicator.all_gather(buffer).wait()
            assert (buffer == total).all()
            buffer.fill_(-1)  # at once: peers must have what they need


@every_transport
def test_buffers_may_be_written_right_after_the_wait(ranks, hosts):
    """Even where peers read them in place."""
    ranks(len(hosts)).run(_late_ranks, hosts)


def _barrier(hosts: tuple[str, ...]) -> list[tuple[float, float]]:
    with communicator_on(hosts) as communicator:
        times = []
        for last in range(communicator.world_size):
            communicator.barrier()
            if communicator.rank == last:
                time.sleep(0.05)
            arrived = time.monotonic()
            communicator.barrier()
            times.append((arrived, time.monotonic()))
    return times


@every_transport
def test_nobody_leaves_a_barrier_before_all_have_come(ranks, hosts):
    """Each rank comes last once."""
    for times in zip(*ranks(len(hosts)).run(_barrier, hosts), strict=True):
        assert max(arrived for arrived, _ in times) <= min(left for _, left in times)


def _memory_of_empty(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            buffers = [communicator.empty(numel, dtype) for numel in (0, 1, 5, 100_000)]
            assert [b.numel() for b in buffers] == [0, 1, 5, 100_000]
            for i, buffer in enumerate(buffers):
                assert buffer.dtype == dtype
                assert buffer.dim() == 1
                buffer.fill_(i % 2)
            assert all((buffer == i % 2).all() for i, buffer in enumerate(buffers))


@every_transport
def test_memory_of_empty(ranks, hosts):
    """Flat, of the dtype asked for, each apart from the others."""
    ranks(len(hosts)).run(_memory_of_empty, hosts)


# -- misuse


def _error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call().wait()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _misuse(hosts: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """The same mistake on all ranks; the group still works after each."""
    with communicator_on(hosts) as communicator:
        odd = communicator.world_size * 5 + 1
        mistakes: dict[str, Callable[[], Any]] = {
            "reduce_scatter": lambda: communicator.reduce_scatter(torch.zeros(odd)),
            "all_gather": lambda: communicator.all_gather(torch.zeros(odd)),
        }
        mistakes["strided"] = lambda: communicator.all_reduce(torch.zeros(20)[::2])
        mistakes["strided broadcast"] = lambda: communicator.broadcast(torch.zeros(4, 4).T, 0)
        mistakes["root"] = lambda: communicator.broadcast(torch.zeros(4), 9)
        mistakes["strided gather"] = lambda: communicator.all_gather(torch.zeros(2 * (odd - 1))[::2])
        mistakes["sliced strides"] = lambda: communicator.reduce_scatter(torch.zeros(2 * (odd - 1))[::2])
        if not isinstance(communicator, TorchCommunicator):
            mistakes["integers"] = lambda: communicator.all_reduce(torch.zeros(4, dtype=torch.int64))
            mistakes["scattered integers"] = lambda: communicator.reduce_scatter(torch.zeros(odd - 1).long())
        if isinstance(communicator, SharedMemoryCommunicator):
            mistakes["strided send"] = lambda: communicator.send(torch.zeros(4, 4).T, 0)
            mistakes["peer"] = lambda: communicator.send(torch.zeros(4), 9)
            mistakes["source"] = lambda: communicator.recv(torch.zeros(4), communicator.rank)
        errors = {}
        for name, call in mistakes.items():
            errors[name] = _error_of(call)
            ones = torch.ones(5000)
            communicator.all_reduce(ones).wait()
            assert (ones == communicator.world_size).all(), name
    return errors


@every_transport
def test_misuse_is_named_and_the_group_goes_on(ranks, hosts):
    """What was given, and what would be right."""
    n = len(hosts)
    for rank, errors in enumerate(ranks(n).run(_misuse, hosts)):
        does_not_divide = ("ValueError", f"a buffer of {5 * n + 1} elements does not divide evenly among {n} ranks")
        assert errors.pop("reduce_scatter")[0] == "ValueError"
        assert errors.pop("all_gather") == does_not_divide
        for name, (kind, text) in errors.items():
            if "integers" in name:
                assert kind == "TypeError"
                assert "int64" in text
                assert "float32, float16, bfloat16, float64" in text
            else:
                assert kind == "ValueError", (name, kind, text)
            if "stride" in name:
                assert "is not contiguous" in text
            if name in ("root", "peer", "source"):
                expected = {"root": f"0 to {n - 1}", "peer": f"group of {n}", "source": f"receive from rank {rank}"}
                assert expected[name] in text


@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_memory_names_both_numbers_that_do_not_divide(ranks, world_size):
    """In reduce_scatter, too."""
    for errors in ranks(world_size).run(_misuse, ONE_HOST[world_size]):
        assert str(5 * world_size + 1) in errors["reduce_scatter"][1]
        assert f"{world_size} ranks" in errors["reduce_scatter"][1]


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
