"""Building engines, warming them up with a check of what they compute, and timing them in turns."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines import ENGINES, Engine, NotAvailableError
from environment import Ranks, peers_mib
from workload import Batch, Task

# Weights, gradients and two moments in fp32, and the bucket or master copy that most engines add.
BYTES_PER_PARAMETER = 24


@dataclass
class Timings:
    """Times in ms, one per round; the loss (mean over ranks) after the warm-up; why an engine did not run."""

    times: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class Pool:
    """Warmed-up engines: all kept at once when memory allows, else one built anew at each turn."""

    def __init__(self, task: Task, batch: Batch, ranks: Ranks, warm_up_steps: int, keep: bool) -> None:
        self._task, self._batch, self._ranks = task, batch, ranks
        self._warm_up_steps = warm_up_steps
        self._keep = keep
        self._engines: dict[str, Engine] = {}
        self.losses: dict[str, list[float]] = {}
        self.peers_mib = 0.0  # see `peers_mib`; at the most

    def take(self, name: str) -> Engine:
        """Raises `NotAvailableError` when the engine's library is."""
        if name in self._engines:
            return self._engines[name]
        engine = ENGINES[name].build(self._task)
        losses = [engine.step(*self._batch).item() for _ in range(self._warm_up_steps)]
        self.losses.setdefault(name, [self._ranks.mean(loss) for loss in losses])
        self._engines[name] = engine
        return engine

    def put_back(self, name: str) -> None:
        if not self._keep:
            self._close(name)

    def close(self) -> None:
        for name in list(self._engines):
            self._close(name)

    def _close(self, name: str) -> None:
        self.peers_mib = max(self.peers_mib, peers_mib())
        self._engines.pop(name).close()
        gc.collect()


def take_turns(names: Sequence[str], rounds: int, pool: Pool, timed: Callable[[Engine], float]) -> Timings:
    """Time every engine once per round: A B C, A B C, ... `timed` gives the ms of a step on the slowest rank."""
    result = Timings(losses=pool.losses)
    for _ in range(rounds):
        for name in names:
            if name in result.missing:
                continue
            try:
                engine = pool.take(name)
            except NotAvailableError as error:
                result.missing[name] = str(error)
                continue
            result.times.setdefault(name, []).append(timed(engine))
            del engine
            pool.put_back(name)
    pool.close()
    return result


def fits_in_memory(task: Task, engines: int, world_size: int) -> bool:
    """Whether that many engines can live side by side in three quarters of the memory now available."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available_bytes = int(line.split()[1]) * 1024
            return engines * world_size * task.numel * BYTES_PER_PARAMETER < 0.75 * available_bytes
    return False


def add_common_arguments(parser: argparse.ArgumentParser, engines: Sequence[str], dtypes: Sequence[str]) -> None:
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    parser.add_argument("--engines", type=engine_names, default=list(engines), help=f"of {','.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps in a row at each turn")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before timing; the loss is checked after them")
    parser.add_argument("--json", type=Path)
    adams = "its own FusedAdam, its DeepSpeedCPUAdam, or torch's fused AdamW (the fastest)"
    parser.add_argument("--deepspeed-adam", choices=("fused", "cpu", "torch"), default="torch", help=adams)


def engine_names(text: str) -> list[str]:
    """`ddp,partita0` as a list; raises for a name that is no engine."""
    names = text.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such engine: {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    return names
