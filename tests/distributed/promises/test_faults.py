"""Ranks that die, stop, hang or disagree in the middle of training: nobody is left waiting.

Over shared memory, except where a test says otherwise.

Each test has processes of its own, which are killed and stopped for real.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import NOTICED_WITHIN_S, START_S, Job, engine_of
from partita.comm import CommunicationError, world_communicator
from support import global_batch, part

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")

Misbehave = Callable[[int], None]  # called in every forward of the rank at fault, with the step


def _train(
    rank: int,
    report: Callable[[Any], None],
    stage: int,
    timeout_s: float,
    at_fault: int,
    misbehave: Misbehave,
    transport: str = "shared_memory",
) -> None:
    """Trains until a CommunicationError; reports ("training",), (when, message) and ("destroyed",)."""
    engine = engine_of(stage, timeout_s, transport)
    if rank == at_fault:
        steps = iter(range(1 << 62))
        engine.module.register_forward_pre_hook(lambda *_: misbehave(next(steps)))
    try:
        for step in range(1 << 62):
            batch = global_batch(step % 10, engine.train_batch_size())
            engine.train_batch(part(batch, rank, engine.world_size))
            if step == 2:
                report("training")
    except CommunicationError as error:
        report((time.monotonic(), str(error)))
    engine.destroy()
    report("destroyed")


def _behave(step: int) -> None:
    pass


def _hang(step: int) -> None:
    if step == 5:
        time.sleep(600)


def _raise(step: int) -> None:
    if step == 5:
        raise ZeroDivisionError("in a forward")


def _survivors_give_up(job: Job, at_fault: int) -> tuple[list[float], list[str]]:
    """When each of the others raised, and what; they could let go of their engines and have exited cleanly."""
    times, messages = [], []
    for rank in range(len(job.processes)):
        if rank == at_fault:
            continue
        raised_at, message = job.report(rank)
        assert job.report(rank) == "destroyed"
        assert job.exits_cleanly(rank)
        assert any(name in message for name in COLLECTIVES), message
        times.append(raised_at)
        messages.append(message)
    return times, messages


# -- one rank is gone


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_noticed_at_once(victim, stage):
    """SIGKILL, the default timeout: the others raise within 2 s, naming the rank, its process and the collective."""
    with Job(3, _train, stage, 600.0, -1, _behave) as job:
        for rank in range(3):
            assert job.report(rank) == "training"
        time.sleep(0.2)
        killed_at = job.signal(victim, signal.SIGKILL)
        times, messages = _survivors_give_up(job, victim)
        died = f"rank {victim} (process {job.processes[victim].pid}) died"
    assert max(times) - killed_at < NOTICED_WITHIN_S
    assert all(died in message for message in messages), messages


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_killed_rank_ends_the_others_over_gloo(stage):
    """Where three ranks pass on what they got, one waits for another that waits for the dead one: the first to know
    gives up all that it has under way, and so the others learn of it, long before gloo's timeout of 60 s."""
    with Job(3, _train, stage, 30.0, -1, _behave, "torch") as job:
        for rank in range(3):
            assert job.report(rank) == "training"
        time.sleep(0.2)
        killed_at = job.signal(1, signal.SIGKILL)
        _, messages = _survivors_give_up(job, 1)
        assert time.monotonic() - killed_at < 20
    for rank, message in zip((0, 2), messages, strict=True):
        assert f"on rank {rank} of 3 over gloo" in message


def _two_groups_over_gloo(rank: int, report: Callable[[Any], None]) -> None:
    first = world_communicator("torch")
    second = world_communicator("torch", beside=first)
    (done := first.all_reduce(torch.zeros(12))).wait()
    second.barrier()
    if rank == 2:
        return
    found = []
    for collective in (first.all_gather, second.all_gather, second.all_reduce):
        try:
            collective(torch.zeros(12)).wait()
        except CommunicationError as error:
            found.append(str(error))
    done.wait()  # has succeeded before
    report(found)


def test_groups_of_one_engine_fail_together():
    """After the first error no collective of either group begins."""
    with Job(3, _two_groups_over_gloo) as job:
        found = [job.report(rank) for rank in range(2)]
    for first, *later in found:
        assert first.startswith("all_gather of 12 float32, on rank ")
        for name, message in zip(("all_gather", "all_reduce"), later, strict=True):
            assert message.startswith(f"{name} of 12 float32, on rank ")
            assert f"after a failed collective ({first}" in message


def test_a_rank_that_raises_is_noticed_at_once():
    """An exception in a forward, which ends the program of that rank."""
    with Job(3, _train, 1, 600.0, 1, _raise) as job:
        for rank in range(3):
            assert job.report(rank) == "training"
        job.processes[1].join(START_S)
        ended_at = time.monotonic()
        assert job.processes[1].exitcode == 1
        times, messages = _survivors_give_up(job, 1)
        who = f"rank 1 (process {job.processes[1].pid})"
    assert max(times) - ended_at < NOTICED_WITHIN_S
    assert all(f"{who} died" in m or f"{who} has left the group" in m for m in messages), messages


# -- one rank is late for ever


def test_a_stopped_rank_is_named_after_the_timeout():
    """SIGSTOP with a timeout of 2 s; when it goes on, it learns what has happened."""
    with Job(3, _train, 2, 2.0, -1, _behave) as job:
        for rank in range(3):
            assert job.report(rank) == "training"
        stopped_at = job.signal(1, signal.SIGSTOP)
        times, messages = _survivors_give_up(job, 1)
        job.signal(1, signal.SIGCONT)
        _, late_message = job.report(1)
        assert job.report(1) == "destroyed"
        assert job.exits_cleanly(1)
        who = f"rank 1 (process {job.processes[1].pid})"
    assert min(times) - stopped_at > 1.5
    assert max(times) - stopped_at < 2 + 3
    for message in messages:
        assert f"{who} did not take part within 2 s" in message
        assert "comm.timeout_seconds" in message
    assert "rank 0" in late_message or "rank 2" in late_message


def test_a_rank_that_hangs_in_the_program_is_named_after_the_timeout():
    """Its process lives, so there is only the timeout."""
    with Job(3, _train, 0, 2.0, 2, _hang) as job:
        for rank in range(3):
            assert job.report(rank) == "training"
        begun_at = time.monotonic()
        times, messages = _survivors_give_up(job, 2)
        who = f"rank 2 (process {job.processes[2].pid})"
    assert max(times) - begun_at < 2 + 3
    assert all(f"{who} did not take part within 2 s" in message for message in messages), messages


def _slow_then_fine(rank: int, report: Callable[[Any], None]) -> None:
    engine = engine_of(2, 2.0)
    for step in range(4):
        if rank == step:
            time.sleep(0.8)
        batch = global_batch(step, engine.train_batch_size())
        engine.train_batch(part(batch, rank, engine.world_size))
    engine.destroy()
    report("done")


def test_a_rank_may_be_late_for_less_than_the_timeout():
    """No false alarm."""
    with Job(3, _slow_then_fine) as job:
        assert [job.report(rank) for rank in range(3)] == ["done"] * 3
