"""Ranks whose engine calls do not match, that end early or are interrupted: who waits learns who did what, at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from jobs import Job, engine_of
from partita.comm import CommunicationError, world_communicator
from support import global_batch, part

TIMEOUT_S = 300.0  # of shared memory: longer than a test may take, so that no timeout helps
WITHIN_S = 60.0

Report = Callable[[Any], None]
Deed = Callable[[partita.Engine, Path], Any]


def _gather(engine: partita.Engine, _: Path) -> None:
    with partita.zero.GatheredParameters(list(engine.module.parameters())):
        pass


# What a rank does instead of another step, and what the other learns.
DEEDS: dict[str, tuple[Deed, str]] = {
    "save_model()": (lambda e, path: e.save_model(path / "model.safetensors"), "save_model() is called on every rank"),
    "GatheredParameters()": (_gather, "GatheredParameters() is called on every rank"),
    "safe_get_full_fp32_param()": (
        lambda e, _: partita.utils.safe_get_full_fp32_param(next(e.module.parameters())),
        "safe_get_full_fp32_param() is called on every rank",
    ),
    "destroy()": (lambda e, _: e.destroy(), "its engine was destroyed: did it have fewer batches?"),
}


def _do_alone(rank: int, report: Report, deed: str, at_fault: int, transport: str, path: Path) -> None:
    engine = engine_of(1, TIMEOUT_S, transport)

    def step(number: int) -> None:
        engine.train_batch(part(global_batch(number, engine.train_batch_size()), rank, engine.world_size))

    step(0)
    try:
        if rank == at_fault:
            DEEDS[deed][0](engine, path)
        step(1)
        report("went on")
    except (CommunicationError, partita.LifecycleError) as error:
        report(str(error))
    report("ready to end")  # a process that waits for another one to learn of it keeps it from ending before


@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_call_of_one_rank_alone_is_named_on_both(deed, transport, tmp_path):
    """`if rank == 0: engine.save_model(...)` and its like, while the other rank trains on."""
    with Job(2, _do_alone, deed, 0, transport, tmp_path) as job:
        alone, other = (job.report(rank, WITHIN_S) for rank in range(2))
    assert DEEDS[deed][1] in other, other
    if deed != "destroy()":
        assert DEEDS[deed][1] in alone, alone
        assert "rank 1 called backward()" in alone and "rank 1 called backward()" in other, (alone, other)


def _two_different_calls(rank: int, report: Report, transport: str, path: Path) -> None:
    engine = engine_of(1, TIMEOUT_S, transport)
    try:
        if rank == 2:
            engine.load_module_state_dict({})
        engine.save_model(path / "model.safetensors")
    except CommunicationError as error:
        report(str(error))
    report("ready to end")


@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
def test_two_calls_are_named_though_their_collectives_look_alike(transport, tmp_path):
    """Both begin with the same small all-reduce."""
    with Job(3, _two_different_calls, transport, tmp_path) as job:
        messages = [job.report(rank, WITHIN_S) for rank in range(3)]
    for message in messages:
        assert "save_model() is called on every rank; rank 2 called load_module_state_dict()" in message, messages


WAITS = ("small", "large", "message")


def _wait(rank: int, report: Report, kind: str, transport: str) -> None:
    """Rank 1 does something else until a signal of its own, and takes part then."""
    communicator = world_communicator(transport)
    communicator.barrier()
    numel = 100_000 if kind == "large" else 10
    go_on = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: go_on.set())
    try:
        report("waiting")
        if rank == 1:
            go_on.wait()
            communicator.barrier()
        waiting = communicator.recv if kind == "message" else communicator.broadcast
        waiting(torch.zeros(numel), 1 - rank).wait()
    except KeyboardInterrupt:
        report("interrupted")
    except CommunicationError as error:
        report(str(error))
    report("ready to end")


@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
@pytest.mark.parametrize("kind", WAITS)
def test_a_signal_ends_the_wait_for_a_rank_that_does_not_come(kind, transport):
    """Ctrl-C on rank 0, while rank 1 does something else: without a signal the wait would last for minutes."""
    with Job(2, _wait, kind, transport) as job:
        assert [job.report(rank) for rank in range(2)] == ["waiting"] * 2
        job.signal(0, signal.SIGINT)
        assert job.report(0, WITHIN_S) == "interrupted"
        assert job.report(0) == "ready to end"
        assert job.exits_cleanly(0)
        job.signal(1, signal.SIGUSR1)
        assert "rank 0" in job.report(1, WITHIN_S)
        assert job.report(1) == "ready to end"
        assert job.exits_cleanly(1)
