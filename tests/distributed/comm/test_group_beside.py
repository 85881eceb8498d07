"""A default process group that cannot carry a model's tensors gets one beside it that can."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import partita
import partita.comm.setup as setup
import pytest
import torch
import torch.distributed as dist
from jobs import Job
from partita.comm import TorchCommunicator, world_communicator
from partita.comm.groups import backend_of
from support import base_config, global_batch, make_model, part
from torch import Tensor

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TIMEOUT = timedelta(seconds=40)


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


# -- groups for GPUs, as far as they go without one


def _asked_for(parts: list[list[int]] | None) -> list[dict[str, Any]]:
    """What torch.distributed is asked for where the default group is gloo's and the model on a GPU."""
    asked: list[dict[str, Any]] = []
    new_group = dist.new_group

    def note(ranks: Any = None, **named: Any) -> Any:
        asked.append({"ranks": ranks, **named})
        return new_group(ranks, backend="gloo")

    with mock.patch.object(dist, "new_group", note):
        world_communicator("auto", TIMEOUT, GPU, parts=parts).close()
    return asked


def test_a_group_of_gloo_gets_one_of_nccl_beside_it_for_a_model_on_a_gpu(ranks):
    """Bound to no GPU, with a timeout of its own; a part's messages in the two directions have a group each."""
    for ranks_of, count in ((None, 1), ([[0, 1]], 2)):
        for asked in ranks(2).run(_asked_for, ranks_of):
            assert len(asked) == count
            for named in asked:
                assert named.pop("timeout") > TIMEOUT
                assert named == {"ranks": ranks_of[0] if ranks_of else None, "backend": "nccl"}


def _ways_of_messages() -> list[tuple[str, bool, int]]:
    """(call, whether it is in the group for messages to lower ranks, the peer)."""
    upwards, downwards = dist.new_group(), dist.new_group()
    used: list[tuple[str, bool, int]] = []

    def noting(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def note(*args: Any, **named: Any) -> Any:
            used.append((name, named["group"] is downwards, named.get("group_dst", named.get("group_src"))))
            return call(*args, **named)

        return note

    communicator = TorchCommunicator(upwards, downwards=downwards)
    peer = 1 - communicator.rank
    with mock.patch.multiple(dist, isend=noting("isend"), irecv=noting("irecv")):
        values = torch.full((3,), float(communicator.rank))
        sent = communicator.send(values, peer)
        communicator.recv(got := torch.zeros(3), peer).wait()
        sent.wait()
    assert (got == peer).all()
    communicator.close()
    for group in (upwards, downwards):
        dist.destroy_process_group(group)
    return used


def test_messages_of_one_queue_go_in_one_direction(ranks):
    """Else two ranks that send to each other, and then receive, would wait for each other on a GPU."""
    assert ranks(2).run(_ways_of_messages) == [
        [("isend", False, 1), ("irecv", True, 1)],
        [("isend", True, 0), ("irecv", False, 0)],
    ]


def _beside_gpus(rank: int, report: Callable[[Any], None], store: Path) -> None:
    """A default group as where there are GPUs, with a backend that no tensor may reach for those."""
    import torch.testing._internal.distributed.fake_pg

    dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:fake", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    report([backend_of(dist.group.WORLD, device) for device in (CPU, GPU)])
    refused = AssertionError("a tensor for GPUs")
    fake = torch._C._distributed_c10d.FakeProcessGroup
    with (
        mock.patch.object(fake, "allreduce", side_effect=refused),
        mock.patch.object(dist, "new_group", side_effect=AssertionError("made a group")),
    ):
        with partita.zero.Init(config=base_config(stage=2)):
            model = make_model()
        engine = partita.Engine(model, config=base_config(stage=2, comm={"transport": "torch"}))
        losses = []
        for step in range(2):
            batch = part(global_batch(step, engine.train_batch_size()), rank, 2)
            losses.append(engine.train_batch(batch).item())
    engine.destroy()
    report(losses)
    on_gpu = world_communicator("torch", TIMEOUT, GPU)
    report((on_gpu.transport, on_gpu.sums_in_fp32))
    on_gpu.close()


@pytest.mark.slow
def test_a_model_on_the_cpu_uses_no_gpu_that_the_default_group_knows(tmp_path):
    """Built under `zero.Init` before an engine is made."""
    with Job(2, _beside_gpus, tmp_path / "store") as job:
        for rank in range(2):
            assert job.report(rank) == ["gloo", "fake"]
            assert len(job.report(rank)) == 2
            assert job.report(rank) == ("fake", False)
            assert job.exits_cleanly(rank)
