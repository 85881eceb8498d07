"""After ranks have died: the survivors go on as a new group, and nothing of the dead is left on the machine.

Each test has processes of its own, which are killed for real.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
import torch.distributed as dist
from jobs import Job, engine_of, meet
from partita.comm import CommunicationError
from support import base_config, global_batch, make_model, part

# -- afterwards


def _go_on_without(rank: int, report: Callable[[Any], None], store: Path) -> None:
    """Rank 1 ends; the others raise, and train on as a job of two."""
    engine = engine_of(1, 30.0)
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
    meet(store / "second", rank // 2, 2)
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
    deadline = time.monotonic() + 120
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


@pytest.mark.alone
def test_killed_jobs_leave_nothing_behind():
    """At random moments: while they meet, build, train."""
    _kill_all_at_random_moments(8)


@pytest.mark.slow
@pytest.mark.alone
def test_fifty_killed_jobs_leave_nothing_behind():
    """The same, for longer."""
    _kill_all_at_random_moments(50)
