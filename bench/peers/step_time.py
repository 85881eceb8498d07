"""One training step, end to end: Partita beside torch alone, DDP, ZeroRedundancyOptimizer, FSDP2 and DeepSpeed.

    torchrun --nproc-per-node 2 bench/peers/step_time.py [--dtype bf16] [--model tiny] [--engines ddp,partita1]
    python bench/peers/step_time.py --engines alone,partita0           one process: what the engine itself costs
    python bench/peers/step_time.py --memory                           peak memory, each engine in processes of its own

All engines start from the same weights and see the same data. They take turns within one run, the slowest rank counts,
and ratios are medians over rounds. The warm-up is also a check: its last loss must be that of plain torch trained on
the batches of all ranks at once (`alone` is left out of that: it sees its own batch only).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from environment import TORCH_RESIDENT_MIB, Ranks, memory_mib  # isort: skip  (it sets up the process for torch)
import torch
from engines import ENGINES, Engine
from measure import Pool, Timings, add_common_arguments, fits_in_memory, take_turns
from memory import print_memory
from report import print_ratios, print_table, ratio, settings_of, spread, write_json
from torch import nn
from workload import Batch, Task, count, gpt, gpt_batch, tiny, tiny_batch

DEFAULT_ENGINES = list(ENGINES)
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    batch: Callable[[int, int, int], Batch]


MODELS = {"gpt": Model(gpt, gpt_batch), "tiny": Model(tiny, tiny_batch)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, DEFAULT_ENGINES, ("fp32", "bf16"))
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--batch", type=int, default=1, help="sequences per rank")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, at most 128")
    parser.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--ranks", type=int, default=2, help="with --memory: processes per engine")
    parser.add_argument("--no-check", action="store_true", help="do not train the reference")
    arguments = parser.parse_args()
    if any(arguments.dtype not in ENGINES[name].dtypes for name in arguments.engines):
        parser.error(f"not every engine trains in {arguments.dtype}")
    return arguments


def make_task(arguments: argparse.Namespace) -> Task:
    build = MODELS[arguments.model].build
    return Task(build, count(build()), arguments.dtype, arguments.clip, arguments.deepspeed_adam)


def reference_loss(task: Task, arguments: argparse.Namespace, world_size: int) -> float:
    """The loss of plain torch in the last warm-up step, on one process that has the batches of all ranks."""
    batches = [MODELS[arguments.model].batch(rank, arguments.batch, arguments.length) for rank in range(world_size)]
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    engine = ENGINES["alone"].build(task)
    return [engine.step(*whole).item() for _ in range(arguments.warm_up)][-1]


def step_timer(ranks: Ranks, batch: Batch, steps: int) -> Callable[[Engine], float]:
    """A function that gives the ms per step of an engine, as its slowest rank sees it."""

    def timed(engine: Engine) -> float:
        ranks.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step(*batch)
        return ranks.largest((time.perf_counter() - start) / steps * 1e3)

    return timed


def print_times(timings: Timings, expected: float | None) -> None:
    rows = []
    base = timings.times.get("alone")
    for name, times in timings.times.items():
        to_alone = f"{ratio(times, base):.2f}" if base else "-"
        losses = timings.losses[name]
        cells = [f"{median(times):.1f}", spread(times), to_alone, f"{losses[0]:.4f}", f"{losses[-1]:.5f}"]
        rows.append([name, *cells, ENGINES[name].about])
    rows += [[name, *"-----", reason] for name, reason in timings.missing.items()]
    print_table(["engine", "ms/step", "range", "x alone", "first loss", "checked loss", "what it is"], rows)
    if expected is not None:
        print(f"reference loss (torch, one process, all data): {expected:.5f}\n")
    print_ratios(timings.times)


def print_warnings(losses: Mapping[str, list[float]], expected: float | None, tolerance: float) -> None:
    for name, values in losses.items():
        if not values[-1] < values[0]:
            print(f"WARNING: {name} does not train: its loss went from {values[0]:.5f} to {values[-1]:.5f}")
        if expected is not None and ENGINES[name].communicates and not abs(values[-1] - expected) <= tolerance:
            print(f"WARNING: {name} does other work: loss {values[-1]:.5f}, reference {expected:.5f}")


def measure(arguments: argparse.Namespace) -> None:
    ranks = Ranks()
    task = make_task(arguments)
    batch = MODELS[arguments.model].batch(ranks.rank, arguments.batch, arguments.length)
    expected = None if arguments.no_check else reference_loss(task, arguments, ranks.world_size)
    keep = bool(ranks.mean(fits_in_memory(task, len(arguments.engines), ranks.world_size)) == 1)
    pool = Pool(task, batch, ranks, arguments.warm_up, keep)
    timings = take_turns(arguments.engines, arguments.rounds, pool, step_timer(ranks, batch, arguments.steps))
    peak_mib = ranks.mean(memory_mib("VmHWM") - TORCH_RESIDENT_MIB - pool.peers_mib)
    if ranks.rank == 0:
        how = f"{task.numel:,} parameters, {ranks.world_size} ranks x {arguments.batch} x {arguments.length} tokens"
        print(f"{arguments.model}: {how}, {arguments.dtype}, clip {arguments.clip or 'off'}; "
              f"{arguments.rounds} rounds of {arguments.steps} steps, "
              f"engines {'side by side' if keep else 'built for each turn'}; "
              f"DeepSpeed's Adam: {arguments.deepspeed_adam}\n")  # fmt: skip
        print_times(timings, expected)
        print_warnings(timings.losses, expected, LOSS_TOLERANCE[arguments.dtype])
        result = {"arguments": settings_of(arguments), "parameters": task.numel, "ranks": ranks.world_size}
        result |= {"ms": timings.times, "losses": timings.losses, "missing": timings.missing}
        result |= {"reference_loss": expected, "peak_mib": peak_mib}
        write_json(arguments.json, result)
    ranks.finish()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.memory:
        measure(arguments)
    elif os.environ.get("RANK", "0") == "0":
        print_memory(arguments, sys.argv[0])


if __name__ == "__main__":
    main()
