"""A grid of pipeline stages x data-parallel ranks: each axis communicates by itself, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from partita import _core
from partita.comm import (
    CommunicationError,
    Communicator,
    HierarchicalCommunicator,
    ProcessGrid,
    Reduction,
    SharedMemoryCommunicator,
    SingleProcess,
    TorchCommunicator,
    communicator_of,
    world_communicator,
)
from torch import Tensor

TIMEOUT = timedelta(seconds=30)
SHARED, TORCH, HOSTS = SharedMemoryCommunicator, TorchCommunicator, HierarchicalCommunicator

# What is asked for, the hosts by rank, and what the world, the data and the pipe axes of 2 x 2 ranks then are.
Placement = tuple[str, str, tuple[type, type, type]]
PLACEMENTS: dict[str, Placement] = {
    "torch": ("torch", "aaaa", (TORCH, TORCH, TORCH)),
    "one host": ("shared_memory", "aaaa", (SHARED, SHARED, SHARED)),
    "a host per stage": ("shared_memory", "aabb", (HOSTS, SHARED, TORCH)),
    "a host per copy": ("shared_memory", "abab", (HOSTS, TORCH, SHARED)),
    "crossed hosts": ("auto", "abba", (HOSTS, TORCH, TORCH)),
    "four hosts": ("auto", "abcd", (TORCH, TORCH, TORCH)),
}
every_placement = pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)


def connect_on(asked: str, hosts: str) -> Callable[..., Communicator]:
    """`world_communicator` on simulated hosts."""
    return partial(world_communicator, asked, TIMEOUT, host=hosts[dist.get_rank()])


@contextmanager
def grid_on(asked: str, hosts: str, pipe: int) -> Iterator[ProcessGrid]:
    """All leave together."""
    grid = ProcessGrid(connect_on(asked, hosts), pipe)
    yield grid
    grid.world.barrier()
    grid.close()


def process_groups() -> int:
    """Those that torch.distributed knows in this process, the default group too."""
    return len(dist.distributed_c10d._world.pg_map)


# -- every collective, on both axes


class Axis:
    """Checks an axis against plain arithmetic over the ranks that must be on it."""

    def __init__(self, communicator: Communicator, ranks: list[int], rank: int) -> None:
        self.communicator, self.ranks, self.rank = communicator, ranks, rank
        self.place = ranks.index(rank)
        assert (communicator.rank, communicator.world_size) == (self.place, len(ranks))
        self._pending: list[tuple[str, Any, Tensor, Tensor]] = []

    @staticmethod
    def values(rank: int, numel: int, seed: int) -> Tensor:
        """What a rank contributes: small integers, whose sums are exact."""
        return torch.randint(-50, 50, (numel,), generator=torch.Generator().manual_seed(97 * seed + rank)).float()

    def launch(self, numel: int, seed: int) -> None:
        """Starts every collective; `finish` checks them."""
        c, n = self.communicator, len(self.ranks)
        every = torch.stack([self.values(r, numel, seed) for r in self.ranks])
        total = every.sum(0)
        buffers = [c.empty(numel, torch.float32).copy_(every[self.place]) for _ in range(4)]
        own = slice(self.place * (numel // n), (self.place + 1) * (numel // n))
        gathered = torch.cat([slices[i] for i, slices in enumerate(every.view(n, n, -1))])
        self._expect("sum", c.all_reduce(buffers[0]), buffers[0], total)
        self._expect("max", c.all_reduce(buffers[1], Reduction.max), buffers[1], every.max(0).values)
        self._expect("scattered", c.reduce_scatter(buffers[2], Reduction.average), buffers[2][own], total[own] / n)
        self._expect("gathered", c.all_gather(buffers[3]), buffers[3], gathered)
        for root in range(n):
            buffer = every[self.place].clone()
            self._expect(f"from {root}", c.broadcast(buffer, root), buffer, every[root])
        following, before = (self.place + 1) % n, (self.place - 1) % n
        received = torch.zeros(numel)
        sent = every[self.place].clone()
        self._expect("sent", c.send(sent, following), sent, every[self.place])
        self._expect("received", c.recv(received, before), received, every[before])

    def finish(self) -> None:
        """Waits for what `launch` began."""
        pending, self._pending = self._pending, []
        for _, handle, _, _ in pending:
            handle.wait()
        for what, _, result, expected in pending:
            assert torch.equal(result, expected), (what, self.ranks, self.rank)

    def _expect(self, what: str, handle: Any, result: Tensor, expected: Tensor) -> None:
        self._pending.append((what, handle, result, expected))


def _collectives(placement: Placement) -> None:
    asked, hosts, kinds = placement
    with grid_on(asked, hosts, pipe=2) as grid:
        rank = dist.get_rank()
        assert grid.coordinates == divmod(rank, 2)
        assert tuple(map(type, (grid.world, grid.data, grid.pipe))) == kinds
        beside = grid.beside_data()
        assert type(beside) is kinds[1]
        stage = [0, 1] if rank < 2 else [2, 3]
        copy = [rank % 2, rank % 2 + 2]
        axes = [
            Axis(c, ranks, rank)
            for c, ranks in ((grid.data, stage), (grid.pipe, copy), (grid.world, [0, 1, 2, 3]), (beside, stage))
        ]
        for seed, numel in enumerate((4, 8_000)):
            for axis in axes:  # one axis after the other
                axis.launch(numel, seed)
                axis.finish()
            for axis in axes:  # all axes under way at once
                axis.launch(numel, 10 + seed)
            for axis in reversed(axes):
                axis.finish()
            for axis in axes:
                axis.communicator.barrier()


@every_placement
def test_each_axis_communicates_among_its_own_ranks(ranks, placement):
    """Every collective, one axis after the other and all of them under way at once."""
    ranks(4).run(_collectives, placement)


def _order_of_its_own(placement: Placement) -> None:
    """One rank of each stage uses the two communicators of the data ranks in the other order."""
    asked, hosts, _ = placement
    with grid_on(asked, hosts, pipe=2) as grid:
        one, other = torch.full((3,), 1.0), torch.full((3,), 10.0)
        beside = grid.beside_data()
        launches = [lambda: grid.data.all_reduce(one), lambda: beside.all_reduce(other)]
        for handle in [launch() for launch in launches[:: 1 if grid.coordinates.data else -1]]:
            handle.wait()
        assert one.tolist() == [2.0] * 3
        assert other.tolist() == [20.0] * 3


@every_placement
def test_the_communicator_beside_has_an_order_of_its_own(ranks, placement):
    """What one rank starts first, another may start last."""
    ranks(4).run(_order_of_its_own, placement)


def _one_stage(asked: str) -> None:
    before = process_groups()
    with grid_on(asked, "aaaa", pipe=1) as grid:
        assert grid.data is grid.world
        assert type(grid.pipe) is SingleProcess
        assert grid.coordinates == (0, dist.get_rank())
        assert process_groups() == before
        beside = grid.beside_data()
        assert beside is not grid.data
        axis = Axis(beside, [0, 1, 2, 3], dist.get_rank())
        axis.launch(4, 0)
        axis.finish()
    assert process_groups() == before


@pytest.mark.parametrize("asked", ["torch", "shared_memory"])
def test_with_one_stage_the_data_axis_is_the_world(ranks, asked):
    """The same object, and no process group is made."""
    ranks(4).run(_one_stage, asked)


def _one_copy(asked: str, hosts: str, kind: type) -> None:
    with grid_on(asked, hosts, pipe=4) as grid:
        assert type(grid.data) is type(grid.beside_data()) is SingleProcess
        assert type(grid.pipe) is kind
        assert grid.pipe is not grid.world
        axis = Axis(grid.pipe, [0, 1, 2, 3], dist.get_rank())
        axis.launch(8, 0)
        axis.finish()


@pytest.mark.parametrize(
    ("asked", "hosts", "kind"),
    [
        ("torch", "aaaa", TORCH),
        ("shared_memory", "aaaa", SHARED),
        ("shared_memory", "aabb", HOSTS),
        ("shared_memory", "abbb", HOSTS),
    ],
)
def test_with_one_copy_the_pipe_axis_has_all_ranks(ranks, asked, hosts, kind):
    """And a data axis is one process. A part on several hosts uses shared memory inside each."""
    ranks(4).run(_one_copy, asked, hosts, kind)


def _large_parts(hosts: str) -> None:
    """Two parts, each on two hosts: both need a group of their hosts' first ranks."""
    world = connect_on("shared_memory", hosts)()
    parts = [[0, 2, 4], [1, 3, 5]]
    mine = parts[dist.get_rank() % 2]
    made = connect_on("shared_memory", hosts)(beside=world, parts=parts)
    assert type(made) is HOSTS
    axis = Axis(made, mine, dist.get_rank())
    for seed in range(3):
        axis.launch(9, seed)
        axis.finish()
    world.barrier()
    made.close()
    world.close()


@pytest.mark.parametrize("hosts", ["aaaabb", "aabbbb", "aabbaa"])
def test_parts_on_several_hosts(ranks, hosts):
    """Shared memory inside each host, torch.distributed between the first ranks of each part's hosts."""
    ranks(6).run(_large_parts, hosts)


# -- what is left of it


def _left(placement: Placement) -> None:
    asked, hosts, _ = placement
    own = dist.new_group([0, 1, 2, 3])  # the program's
    before = process_groups()
    for _ in range(3):
        with grid_on(asked, hosts, pipe=2) as grid:
            grid.beside_data()
        grid.close()  # nothing happens
        assert process_groups() == before
    world = connect_on(asked, hosts)()
    for _ in range(3):
        beside = connect_on(asked, hosts)(beside=world)
        beside.barrier()
        beside.close()
        beside.close()
    world.barrier()
    world.close()
    given = communicator_of(own, asked, TIMEOUT, host=hosts[dist.get_rank()])
    given.barrier()
    given.close()
    assert process_groups() == before
    ones = torch.ones(2)
    for group in (None, own):  # which nobody has ended
        dist.all_reduce(ones, group=group)
    assert ones.tolist() == [16.0, 16.0]
    dist.destroy_process_group(own)


@every_placement
def test_process_groups_end_with_their_communicators(ranks, placement):
    """Those made for a communicator; the default group and the program's stay."""
    ranks(4).run(_left, placement)


def _closed(pipe: int) -> list[int]:
    """How often each communicator of a grid was closed."""
    made: list[Communicator] = []

    def connect(**kwargs: Any) -> Communicator:
        communicator = world_communicator("auto", TIMEOUT, **kwargs)
        communicator.close = mock.Mock(wraps=communicator.close)
        made.append(communicator)
        return communicator

    grid = ProcessGrid(connect, pipe)
    grid.beside_data()
    grid.world.barrier()
    grid.close()
    grid.close()
    return [communicator.close.call_count for communicator in made]


def test_a_grid_closes_each_communicator_once(ranks):
    """Also if two of its axes are one."""
    assert ranks(4).run(_closed, 1) == [[1, 1]] * 4
    assert ranks(4).run(_closed, 2) == [[1, 1, 1, 1]] * 4


# -- failures


def _uneven() -> tuple[str, int]:
    closed: list[str] = []

    def connect(**kwargs: Any) -> Communicator:
        communicator = world_communicator("shared_memory", TIMEOUT, **kwargs)
        communicator.close = lambda: closed.append("world")
        return communicator

    with pytest.raises(ValueError, match="do not divide") as raised:
        ProcessGrid(connect, pipe=3)
    return str(raised.value), len(closed)


def test_a_world_that_does_not_divide_is_refused(ranks):
    """And left."""
    for message, closed in ranks(4).run(_uneven):
        assert message.startswith("4 ranks do not divide evenly among 3 pipeline stages")
        assert closed == 1


def _broken(asked: str, hosts: str, broken: int, pipe: int) -> tuple[str, str, int]:
    """Rank `broken` cannot join the second group over shared memory: its part of the data axis. Type of the data axis,
    the error, and how many process groups are left over."""
    before, make, calls = process_groups(), _core.SharedMemoryGroup, []

    def refuse(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2 and dist.get_rank() == broken:
            raise RuntimeError("memfd_create: not permitted")
        return make(*args)

    with mock.patch.object(_core, "SharedMemoryGroup", refuse):
        try:
            connect = partial(world_communicator, asked, timedelta(seconds=1), host=hosts[dist.get_rank()])
            grid = ProcessGrid(connect, pipe)
        except RuntimeError as error:
            dist.barrier()
            return "", str(error), process_groups() - before
    axis = Axis(grid.data, grid.shape.data_groups[grid.coordinates.pipe], dist.get_rank())
    axis.launch(4, 0)
    axis.finish()
    kind = type(grid.data).__name__
    grid.world.barrier()
    grid.close()
    return kind, "", process_groups() - before


@pytest.mark.parametrize(("hosts", "broken"), [("aaaa", 1), ("aaaa", 2), ("aabb", 0)])
def test_all_ranks_raise_when_one_part_cannot_have_its_shared_memory(ranks, hosts, broken):
    """Also those of the other parts, which would wait in the next axis. Nothing is left."""
    part = {0, 1} if broken < 2 else {2, 3}
    for rank, (_, error, left) in enumerate(ranks(4).run(_broken, "shared_memory", hosts, broken, 2)):
        assert 'comm.transport is "shared_memory", but ' in error
        assert left == 0
        if rank not in part:
            assert error.startswith("a part of the job's ranks cannot communicate: on rank ")
            assert f"on rank {broken}: " in error
        if rank == broken or rank not in part:
            assert "memfd_create: not permitted" in error


def test_a_part_that_cannot_share_memory_goes_on_over_torch(ranks):
    """With "auto": that part alone."""
    outcomes = ranks(4).run(_broken, "auto", "aaaa", 1, 2)
    assert outcomes == [("TorchCommunicator", "", 0)] * 2 + [("SharedMemoryCommunicator", "", 0)] * 2


def _fails_half_way(what: str, hosts: str) -> tuple[str, int]:
    """The same failure on all ranks, after process groups have been made; groups that are left over."""
    before = process_groups()
    world = connect_on("auto", hosts)()
    raises = mock.Mock(side_effect=OSError("out of file descriptors"))
    with mock.patch(f"partita.comm.choice.{what}", raises), pytest.raises(OSError, match="out of") as raised:
        if hosts == "aabb":
            connect_on("auto", hosts)(beside=world)
        else:
            connect_on("auto", hosts)(parts=[[0, 1], [2, 3]])
    world.barrier()
    world.close()
    return str(raised.value), process_groups() - before


@pytest.mark.parametrize(
    ("what", "hosts"),
    [
        ("exchange_contacts", "aaaa"),
        ("exchange_contacts", "aabb"),
        ("HierarchicalCommunicator", "aabb"),
        ("SharedMemoryCommunicator", "aaaa"),
    ],
)
def test_a_communicator_that_fails_half_way_leaves_no_group(ranks, what, hosts):
    """Whether groups were made for a part, for hosts, or beside others."""
    for error, left in ranks(4).run(_fails_half_way, what, hosts):
        assert "out of file descriptors" in error
        assert left == 0


def _failing_together() -> list[bool]:
    """Whether each communicator of a grid starts nothing after a failure on the data axis."""
    grid = ProcessGrid(partial(world_communicator, "torch", TIMEOUT), pipe=2)
    beside, failed = grid.beside_data(), []
    with (
        mock.patch.object(dist, "all_reduce", side_effect=RuntimeError("connection reset")),
        pytest.raises(CommunicationError, match="connection reset"),
    ):
        grid.data.all_reduce(torch.zeros(3))
    for communicator in (grid.data, grid.pipe, grid.world, beside):
        with pytest.raises(CommunicationError, match=r"after a failed collective .*connection reset"):
            communicator.all_reduce(torch.zeros(3))
        failed.append(True)
    dist.barrier()
    grid.close()
    return failed


def test_the_axes_of_a_grid_fail_together(ranks):
    """Over torch.distributed, where a rank that has died is not named."""
    assert ranks(4).run(_failing_together) == [[True] * 4] * 4
