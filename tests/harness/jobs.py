"""Jobs of tests in which ranks die, stop or hang: processes of their own, which report as they go."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from ranks import warm_context
from support import base_config, make_model

NOTICED_WITHIN_S = 2.0  # that a process is dead
START_S = 60  # a loaded machine starts processes slowly


class Job:
    """Processes that run `function(rank, report, *args)` and report as they go; killed at the end of the block."""

    def __init__(self, world_size: int, function: Callable[..., None], *args: Any) -> None:
        context = warm_context()
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
    meet(store / "first", rank, world_size)
    function(rank, report.send, *args)


def meet(store: Path, rank: int, world_size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )


def engine_of(stage: int, timeout_s: float, transport: str = "shared_memory") -> partita.Engine:
    comm = {"transport": transport, "timeout_seconds": timeout_s}
    return partita.Engine(make_model(), config=base_config(stage=stage, comm=comm))


def children_of(parent: int) -> list[int]:
    """The processes that a process has started, in their order."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"\nPPid:\t{parent}\n" in status.read_text():
                found.append(int(status.parent.name))
    return sorted(found)
