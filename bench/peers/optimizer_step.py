"""The optimizer step alone, gradients at hand: norm, overflow check, clipping at 1, Adam, cast; 100 tensors x 400,000.

    python bench/peers/optimizer_step.py [--dtype bf16|fp16]
    torchrun --nproc-per-node 2 bench/peers/optimizer_step.py

The gradients come from an untimed forward and backward of a sum; reductions that an engine runs in backward are not
counted, gathering updated weights after a sharded step is. Times are also given as bytes per parameter: what a plain
copy, measured in the same rounds, moves (reads and writes) in the time of the step. The floor is what a step moves that
reads gradients twice and everything else once. A copy also fetches the lines that it is about to overwrite, uncounted,
and a step in place does not: one that reaches the floor can come out below it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from engines import ENGINES, Engine
from measure import Pool, Timings, add_common_arguments, fits_in_memory, take_turns
from report import print_ratios, print_table, ratio, settings_of, spread, write_json
from workload import Task, count, vectors

DEFAULT_ENGINES = ["alone", *(f"{library}{stage}" for library in ("deepspeed", "partita") for stage in (0, 1, 2))]
FLOOR_BYTES = {"fp32": 32, "bf16": 30, "fp16": 30}
COPY_BYTES = 256 * 2**20
CLIP = 1.0


@dataclass
class StepTimer:
    """Gives the ms per `update()` of an engine, slowest rank, and measures the copy bandwidth beside it."""

    ranks: Ranks
    steps: int
    bandwidths: list[float] = field(default_factory=list)  # bytes read and written per ms, on the slowest rank
    _source: torch.Tensor = field(default_factory=lambda: torch.ones(COPY_BYTES // 4))
    _target: torch.Tensor = field(default_factory=lambda: torch.zeros(COPY_BYTES // 4))

    def __call__(self, engine: Engine) -> float:
        self.bandwidths.append(2 * COPY_BYTES / self._slowest_ms(lambda: self._target.copy_(self._source)))
        times = []
        for _ in range(self.steps):
            engine.forward_backward()
            times.append(self._slowest_ms(engine.update))
        return median(times)

    def _slowest_ms(self, work: Callable[[], object]) -> float:
        self.ranks.barrier()
        start = time.perf_counter()
        work()
        return self.ranks.largest((time.perf_counter() - start) * 1e3)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, DEFAULT_ENGINES, ("fp32", "bf16", "fp16"))
    arguments = parser.parse_args()
    if arguments.dtype != "fp32":  # torch has no masters for 16-bit weights: nothing to compare with
        arguments.engines = [name for name in arguments.engines if ENGINES[name].sixteen_bit_weights]
    return arguments


def floor_bytes(name: str, dtype: str, world_size: int) -> float:
    """Bytes per model parameter that a rank must move; with a sharded step it has only its share to do."""
    return FLOOR_BYTES[dtype] / (world_size if ENGINES[name].sharded_step else 1)


def print_times(timings: Timings, task: Task, bandwidth: float, world_size: int) -> None:
    rows = []
    for name, times in timings.times.items():
        moved = median(times) * bandwidth / task.numel
        peer = timings.times.get(f"deepspeed{name[-1]}")
        to_peer = f"{ratio(times, peer):.2f}" if peer else "-"
        to_floor = f"{moved / floor_bytes(name, task.dtype, world_size):.2f}"
        cells = [f"{median(times):.1f}", spread(times), f"{moved:.1f}", to_floor, to_peer]
        rows.append([name, *cells, f"{timings.losses[name][-1]:.4f}", ENGINES[name].about])
    rows += [[name, *"------", reason] for name, reason in timings.missing.items()]
    header = ["engine", "ms/step", "range", "bytes/parameter", "x floor", "x DeepSpeed's stage", "loss", "what it is"]
    print_table(header, rows)
    print_ratios(timings.times)


def print_warnings(timings: Timings, dtype: str) -> None:
    """All gradients are the same constant, so every engine must have lowered the loss by the same amount."""
    falls = {name: losses[0] - losses[-1] for name, losses in timings.losses.items()}
    expected = median(falls.values()) if falls else 0.0
    tolerance = 1e-3 if dtype == "fp32" else 3e-2
    for name, fall in falls.items():
        if not abs(fall - expected) <= tolerance * abs(expected) or fall <= 0:
            print(f"WARNING: {name} does other work: its loss fell by {fall:.5f}, the median is {expected:.5f}")


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks()
    task = Task(vectors, count(vectors()), arguments.dtype, CLIP, arguments.deepspeed_adam)
    keep = ranks.mean(fits_in_memory(task, len(arguments.engines), ranks.world_size)) == 1
    timer = StepTimer(ranks, arguments.steps)
    pool = Pool(task, (), ranks, arguments.warm_up, keep)
    timings = take_turns(arguments.engines, arguments.rounds, pool, timer)
    if ranks.rank == 0:
        bandwidth = median(timer.bandwidths) if timer.bandwidths else 0.0
        print(f"{task.numel:,} parameters, {ranks.world_size} ranks, {task.dtype}, clip {CLIP}, "
              f"{torch.get_num_threads()} threads per rank; copy {bandwidth / 1e6:.1f} GB/s per rank; "
              f"DeepSpeed's Adam: {arguments.deepspeed_adam}\n")  # fmt: skip
        print_times(timings, task, bandwidth, ranks.world_size)
        print_warnings(timings, task.dtype)
        result = {"arguments": settings_of(arguments), "parameters": task.numel, "ranks": ranks.world_size}
        result |= {"ms": timings.times, "losses": timings.losses, "missing": timings.missing}
        write_json(arguments.json, result | {"copy_bytes_per_ms": timer.bandwidths})
    ranks.finish()


if __name__ == "__main__":
    main()
