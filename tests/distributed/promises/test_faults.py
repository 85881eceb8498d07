"""Ranks that die, stop, hang or disagree in the middle of training: nobody is left waiting.

Over shared memory, except where a test says otherwise.

Each test has processes of its own, which are killed and stopped for real.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
import torch.distributed as dist
from partita.comm import CommunicationError, Communicator, world_communicator
from support import base_config, global_batch, make_model, part

NOTICED_WITHIN_S = 2.0  # that a process is dead
START_S = 60  # a loaded machine starts processes slowly
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")

# -- processes

Misbehave = Callable[[int], None]  # called in every forward of the rank at fault, with the step


class Job:
    """Processes that run `function(rank, report, *args)` and report as they go; killed at the end of the block."""

    def __init__(self, world_size: int, function: Callable[..., None], *args: Any) -> None:
        # Forked from a process that has imported torch, so that a job starts in a fraction of a second.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "partita", "support"])
        self.store = Path(tempfile.mkdtemp(prefix="partita-faults-"))
        self.processes: list[Any] = []
        self.reports: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(rank, world_size, self.store, theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.reports.append(ours)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def report(self, rank: int, timeout_s: float = START_S) -> Any:
        """The next thing that a rank says."""
        assert self.reports[rank].poll(timeout_s), f"rank {rank} says nothing"
        return self.reports[rank].recv()

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Sends it; returns when."""
        os.kill(self.processes[rank].pid, number)
        return time.monotonic()

    def exits_cleanly(self, rank: int, within_s: float = 10) -> bool:
        self.processes[rank].join(within_s)
        return bool(self.processes[rank].exitcode == 0)


def _run(
    rank: int, world_size: int, store: Path, report: Connection, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    _meet(store / "first", rank, world_size)
    function(rank, report.send, *args)


def _meet(store: Path, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )


def _engine(stage: int, timeout_s: float, transport: str = "shared_memory") -> partita.Engine:
    comm = {"transport": transport, "timeout_seconds": timeout_s}
    return partita.Engine(make_model(), config=base_config(stage=stage, comm=comm))


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
    engine = _engine(stage, timeout_s, transport)
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
    """SIGKILL with a timeout of 30 s: the others raise within 2 s, naming the rank, its process and the collective."""
    with Job(3, _train, stage, 30.0, -1, _behave) as job:
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
    with Job(3, _train, 1, 30.0, 1, _raise) as job:
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
    engine = _engine(2, 2.0)
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


# -- ranks that disagree

CALLS: dict[str, Callable[[Communicator, int], Any]] = {
    "all_reduce (sum) of 12 f32": lambda c, _: c.all_reduce(torch.zeros(12)),
    "all_reduce (average) of 12 f32": lambda c, _: c.all_reduce(torch.zeros(12), partita.comm.Reduction.average),
    "all_reduce (sum) of 6000 f32": lambda c, _: c.all_reduce(torch.zeros(6000)),
    "all_reduce (sum) of 6000 bf16": lambda c, _: c.all_reduce(torch.zeros(6000, dtype=torch.bfloat16)),
    "reduce_scatter (sum) of 12 f32": lambda c, _: c.reduce_scatter(torch.zeros(12)),
    "all_gather of 6000 f32": lambda c, _: c.all_gather(c.empty(6000, torch.float32)),
    "broadcast from rank 0 of 96 bytes": lambda c, _: c.broadcast(torch.zeros(12, dtype=torch.int64), 0),
    "broadcast from rank 1 of 96 bytes": lambda c, _: c.broadcast(torch.zeros(12, dtype=torch.int64), 1),
    "barrier": lambda c, _: c.barrier(),
}
NAMES = list(CALLS)
PAIRS = [(0, 1), (0, 2), (0, 4), (2, 3), (5, 2), (6, 7), (8, 0), (3, 8)]


def _disagree(pairs: list[tuple[str, str]], odd_one: int) -> list[list[str]]:
    """For each pair, the errors of the call, of waiting again, and of the next call."""
    messages = []
    for usual, other in pairs:
        communicator = world_communicator("shared_memory", timedelta(seconds=10))
        found = []
        try:
            handle = CALLS[other if communicator.rank == odd_one else usual](communicator, 0)
            if handle is not None:
                handle.wait()
        except CommunicationError as error:
            found.append(str(error))
        try:
            communicator.barrier()
        except CommunicationError as error:
            found.append(str(error))
        dist.barrier()
        communicator.close()
        messages.append(found)
    return messages


@pytest.mark.parametrize("odd_one", [0, 1])
def test_different_calls_name_both_sides_on_all_ranks(ranks, odd_one):
    """Another collective, size, dtype, reduction or root; the group is of no use afterwards, and says so."""
    pairs = [(NAMES[a], NAMES[b]) for a, b in PAIRS]
    for rank, messages in enumerate(ranks(3).run(_disagree, pairs, odd_one)):
        for (usual, other), (message, later) in zip(pairs, messages, strict=True):
            assert usual in message, (rank, message)
            assert other in message, (rank, message)
            assert f"on rank {odd_one}" in message
            assert "all ranks must call the same collectives in the same order" in message
            assert later == message


def _mismatched_message() -> str:
    communicator = world_communicator("shared_memory", timedelta(seconds=10))
    try:
        if communicator.rank == 0:
            communicator.send(torch.zeros(5), 1).wait()
        else:
            communicator.recv(torch.zeros(6, dtype=torch.bfloat16), 0).wait()
    except CommunicationError as error:
        return str(error)
    finally:
        dist.barrier()
        communicator.close()
    return ""


def test_a_receive_names_what_was_sent_instead(ranks):
    """The receiver is the one to notice."""
    message = ranks(2).run(_mismatched_message)[1]
    for part_of_it in ("receive from rank 0 of 6 bf16", "rank 0 sent 5 f32"):
        assert part_of_it in message


# -- afterwards


def _go_on_without(rank: int, report: Callable[[Any], None], store: Path) -> None:
    """Rank 1 ends; the others raise, and train on as a job of two."""
    engine = _engine(1, 30.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for step in range(100):
            engine.train_batch(part(global_batch(step, engine.train_batch_size()), rank, engine.world_size))
        report("nothing was raised")
        return
    except CommunicationError:
        weights = engine.module_state_dict()  # readable still
        engine.destroy()
    dist.destroy_process_group()
    _meet(store / "second", rank // 2, 2)
    model = make_model()
    model.load_state_dict(weights)
    engine = partita.Engine(model, config=base_config(stage=1, comm={"transport": "shared_memory"}))
    losses = [
        engine.train_batch(part(global_batch(0, engine.train_batch_size()), engine.global_rank, 2)).item()
        for _ in range(5)
    ]
    engine.destroy()
    report(losses)


def test_the_survivors_can_go_on_as_a_new_group(tmp_path):
    """In the same processes, with the weights that they have."""
    with Job(3, _go_on_without, tmp_path) as job:
        for rank in (0, 2):
            losses = job.report(rank)
            assert losses[-1] < losses[0]
            assert job.exits_cleanly(rank)


# -- nothing is left


def _shared_bytes() -> int:
    """Shared memory of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise KeyError("Shmem")


def _abstract_sockets() -> set[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {line.split()[-1] for line in lines if line.split()[-1].startswith("@")}


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Others on the machine come and go: what counts is the least that is seen within a while."""
    shared, sockets = _shared_bytes(), _abstract_sockets()
    yield
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if _shared_bytes() <= shared + 50_000_000 and _abstract_sockets() <= sockets:
            return
        time.sleep(0.2)
    pytest.fail(f"shared memory grew by {_shared_bytes() - shared:,} bytes; new: {_abstract_sockets() - sockets}")


def _train_large(rank: int, report: Callable[[Any], None]) -> None:
    """Holds some 120 MB of shared memory per rank."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(12)))
    comm = {"transport": "shared_memory"}
    engine = partita.Engine(model, config=base_config(stage=0, reduce_bucket_size=1 << 20, comm=comm))
    report("made")
    while True:
        engine.backward(engine(torch.ones(1, 1024)).square().mean())
        engine.step()


def _kill_all_at_random_moments(rounds: int) -> None:
    moments = random.Random(0)
    with _nothing_left():
        for i in range(rounds):
            with Job(3, _train_large) as job:
                if i % 2 == 0:
                    assert job.report(0) == "made"
                time.sleep(moments.uniform(0, 1))
            assert all(process.exitcode == -signal.SIGKILL for process in job.processes)


def test_killed_jobs_leave_nothing_behind():
    """At random moments: while they meet, build, train."""
    _kill_all_at_random_moments(8)


@pytest.mark.slow
def test_fifty_killed_jobs_leave_nothing_behind():
    """The same, for longer."""
    _kill_all_at_random_moments(50)
