"""A grid that cannot be made, or fails, fails on all ranks and leaves nothing."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from grids import TIMEOUT, Axis, connect_on, process_groups
from partita import _core
from partita.comm import (
    CommunicationError,
    ProcessGrid,
    world_communicator,
)


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
