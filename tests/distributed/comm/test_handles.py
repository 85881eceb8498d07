"""One contract for all transports: messages, handles, the order of waits, buffers, misuse."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_transport import (
    ONE_HOST,
    REDUCTIONS,
    assert_reduced,
    communicator_on,
    every_transport,
    reduced,
    same,
    values_of,
)
from partita.comm import (
    Reduction,
    SharedMemoryCommunicator,
    TorchCommunicator,
)
from torch import Tensor

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
            assert same(got, expected)
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
