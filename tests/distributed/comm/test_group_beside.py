"""A default process group that cannot carry a model's tensors gets one beside it that can."""

from __future__ import annotations

from typing import Any
from unittest import mock

import partita.comm.setup as setup
import pytest
import torch
import torch.distributed as dist
from partita.comm import world_communicator
from partita.comm.groups import backend_of
from torch import Tensor

CPU = torch.device("cpu")


def _through_a_group_beside(asked: str) -> tuple[list[str], bool, list[float]]:
    """Backends of the groups that were made, whether the default group was left alone, and a sum over the ranks."""
    made: list[str] = []
    new_group = dist.new_group

    def note(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs.get("backend", "default"))
        return new_group(*args, **kwargs)

    def carries_nothing(group: Any, device: torch.device) -> str | None:
        return None if group is dist.group.WORLD else backend_of(group, device)

    with mock.patch.object(dist, "new_group", note), mock.patch.object(setup, "backend_of", carries_nothing):
        communicator = world_communicator(asked)
    left_alone = getattr(communicator, "_group", None) is not dist.group.WORLD
    values: Tensor = communicator.empty(2, torch.float32).fill_(communicator.rank + 1.0)
    communicator.all_reduce(values).wait()
    total = values.tolist()
    communicator.close()
    return made, left_alone, total


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_a_group_that_cannot_carry_the_cpu_gets_one_beside_it(ranks, asked):
    assert ranks(2).run(_through_a_group_beside, asked) == [(["gloo"], True, [3.0, 3.0])] * 2


def _carriers() -> tuple[str | None, str | None, int]:
    """What carries CPU tensors in the default group and in one for GPUs alone; groups made for a CPU model."""
    for_gpus = dist.new_group(backend="cuda:gloo")
    with mock.patch.object(dist, "new_group", side_effect=AssertionError("made a group")) as made:
        world_communicator("torch")
    return backend_of(dist.group.WORLD, CPU), backend_of(for_gpus, CPU), made.call_count


def test_a_group_that_can_is_used_as_it_is(ranks):
    assert ranks(2).run(_carriers) == [("gloo", None, 0)] * 2
