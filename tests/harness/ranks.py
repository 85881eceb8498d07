"""Real processes for tests: a pool of ranks that joins once and runs many functions."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
RESULT_TIMEOUT_S = 240


class RankError(AssertionError):
    """A function raised on some rank; carries every rank's traceback."""


class RankPool:
    """`world_size` processes in one gloo group; `run` calls a module-level function on all of them.

    Their engines and communicators use `transport`, unless a config or a call asks for another one. Fresh processes
    take seconds to import torch; they have the environment of the moment, and their memory's history is their own.
    """

    def __init__(self, world_size: int, transport: str, *, fresh: bool = False) -> None:
        self.world_size = world_size
        self.transport = transport
        self._context: Any = mp.get_context("spawn") if fresh else warm_context()
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = [self._receive(rank) for rank in range(self.world_size)]
        failed = [f"rank {rank}:\n{trace}" for rank, (_, trace) in enumerate(outcomes) if trace]
        if failed:
            self.close()  # the ranks may be out of step
            raise RankError("\n".join(failed))
        return [result for result, _ in outcomes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp(prefix="partita-ranks-")) / "store"
        for rank in range(self.world_size):
            ours, theirs = self._context.Pipe()
            args = (rank, self.world_size, str(store), self.transport, theirs)
            process = self._context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int) -> tuple[Any, str]:
        if self._pipes[rank].poll(RESULT_TIMEOUT_S):
            try:
                return self._pipes[rank].recv()  # type: ignore[no-any-return]
            except EOFError:
                self._processes[rank].join()
                return None, f"the process died with exit code {self._processes[rank].exitcode}"
        return None, f"no result within {RESULT_TIMEOUT_S} s"


def warm_context() -> ForkServerContext:
    """For processes that start in a fraction of a second: forked from one that has imported torch, with one thread.

    The first optimizer of a process imports torch._dynamo, in seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "partita", "support"])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        ensure_running()
    return context


def leave_imports_alone() -> None:
    """What imports have made, 300,000 objects and more, is not looked through by each `gc.collect()` of a test."""
    gc.collect()
    gc.freeze()


def _serve(rank: int, world_size: int, store: str, transport: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import inside
    import torch
    import torch.distributed as dist
    from communicators import world_communicator_by_default

    torch.set_num_threads(1)
    inside.connect_by(world_communicator_by_default(transport))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    imported = 0
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        if len(sys.modules) > imported:
            imported = len(sys.modules)
            leave_imports_alone()
        try:
            pipe.send((function(*args), ""))
        except Exception:
            pipe.send((None, traceback.format_exc()))
