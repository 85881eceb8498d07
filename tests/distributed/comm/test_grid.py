"""A grid of pipeline stages x data-parallel ranks: each axis communicates by itself, and nothing of it is left."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from grids import TIMEOUT, Axis, connect_on, grid_on, process_groups
from partita.comm import (
    Communicator,
    HierarchicalCommunicator,
    ProcessGrid,
    SharedMemoryCommunicator,
    SingleProcess,
    TorchCommunicator,
    communicator_of,
    world_communicator,
)

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


# -- every collective, on both axes


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
