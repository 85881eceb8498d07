"""A step of one GPT on a pipeline of two ranks: Partita beside torch.distributed.pipelining and DeepSpeed.

    torchrun --nproc-per-node 2 bench/peers/pipeline.py [--engines torch:1f1b,partita:1f1b] [--json FILE]

All engines start from the same weights, have the same layers in each stage and see the same data. They take turns
within one run, the slowest rank counts, and ratios are medians over rounds. The warm-up is also a check: its last loss
must be that of the whole model in one process. Then, of Partita's: the idle time beside the simulated one, the
activations beside the simulated ones, and the time that one activation tensor is under way.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from engines import NotAvailableError
from partita.pipeline import by_name
from pipeline_engines import ENGINES, Pipeline, alone
from pipeline_measures import Activations, Idle, Transfer, activations, costs_of, idle_time, memory_costs, transport_us
from pipeline_task import ModelConfig, PipelineTask, costs_by_operations
from report import print_table, ratio, settings_of, spread, write_json

Series = Mapping[str, list[float]]

ALONE = "one process"
LOSS_TOLERANCE = 1e-4
DEFAULT_ENGINES = [name for name in ENGINES if not name.startswith("partita-gloo")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=engine_names, default=DEFAULT_ENGINES, help=f"of {','.join(ENGINES)}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps in a row at each turn")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before timing; the loss is checked after them")
    adams = "DeepSpeed's: its own FusedAdam, or torch's fused AdamW (the faster)"
    parser.add_argument("--deepspeed-adam", choices=("fused", "torch"), default="torch", help=adams)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def engine_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such engine: {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    return names


def make_task(arguments: argparse.Namespace) -> PipelineTask:
    sizes = {name: getattr(arguments, name) for name in ("vocabulary", "layers", "heads", "width")}
    model = ModelConfig(context=arguments.length, **sizes)
    costs = costs_by_operations(model, arguments.length)
    return PipelineTask(
        model, arguments.micro_batches, arguments.batch, arguments.length, costs, arguments.deepspeed_adam
    )


@dataclass
class Turns:
    """Pipelines that take turns. By engine: losses of the warm-up; per round, ms of a step as the slowest rank sees it,
    and ms of the processors, of all ranks together, which other processes disturb less; why an engine did not run."""

    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    ms: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def warm_up(self, name: str, build: Callable[[PipelineTask], Pipeline], task: PipelineTask, steps: int) -> None:
        try:
            pipeline = self.pipelines[name] = build(task)
        except NotAvailableError as error:
            self.missing[name] = str(error)
            return
        self.losses[name] = [pipeline.step() for _ in range(steps)]
        self.ms[name], self.cpu_ms[name] = [], []

    def time(self, name: str, steps: int, ranks: Ranks) -> None:
        pipeline = self.pipelines[name]
        ranks.barrier()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            pipeline.step()
        used = time.process_time() - used
        self.ms[name].append(ranks.largest((time.perf_counter() - start) / steps * 1e3))
        self.cpu_ms[name].append(ranks.mean(used) * ranks.world_size / steps * 1e3)

    def share_losses(self, ranks: Ranks) -> None:
        """Of the rank that knows them: with the last stage."""
        for name, values in self.losses.items():
            self.losses[name] = [ranks.largest(-math.inf if math.isnan(loss) else loss) for loss in values]


def print_times(turns: Turns) -> None:
    ours = [name for name in turns.ms if name.startswith("partita")]
    best = min(ours, key=lambda name: median(turns.ms[name]), default=None)
    rows = []
    for name, values in turns.ms.items():
        same = "" if name == ALONE else ENGINES[name].same_schedule
        cells = [f"{median(values):.1f}", spread(values)]
        cells += [f"{ratio(values, turns.ms[base]):.2f}" if base in turns.ms else "-" for base in (same, best)]
        cells += [f"{median(turns.cpu_ms[name]):.0f}", f"{turns.losses[name][-1]:.5f}"]
        rows.append([name, *cells, "torch, on each rank at once" if name == ALONE else ENGINES[name].about])
    rows += [[name, *"------", reason] for name, reason in turns.missing.items()]
    header = ["engine", "ms/step", "range", "x Partita's", "x its best", "CPU ms", "checked loss", "what it is"]
    print_table(header, rows)


def print_warnings(losses: Series) -> None:
    expected = losses[ALONE][-1]
    for name, values in losses.items():
        if not values[-1] < values[0]:
            print(f"WARNING: {name} does not train: its loss went from {values[0]:.5f} to {values[-1]:.5f}")
        if not abs(values[-1] - expected) <= LOSS_TOLERANCE:
            print(f"WARNING: {name} does other work: loss {values[-1]:.5f}, one process {expected:.5f}")


def look_inside(pipelines: Mapping[str, Pipeline], task: PipelineTask, steps: int, ranks: Ranks) -> dict[str, Any]:
    """Of Partita's pipelines: idle time and activations, measured and simulated. Printed, and as JSON."""
    transport = transport_us(task, steps, ranks)
    idle, memory = {}, {}
    for name, pipeline in pipelines.items():
        if pipeline.engine is None:
            continue
        schedule = by_name(name.partition(":")[2], ranks.world_size, task.micro_batches)
        overlaps = name.startswith("partita-gloo")
        microseconds = median(transport["our gloo" if overlaps else "shared memory"])
        idle[name] = idle_time(pipeline, schedule, steps, Transfer(microseconds / 1e6, overlaps), ranks)
        costs = memory_costs(task, costs_of({}, schedule.num_stages))
        memory[name] = activations(pipeline, schedule, costs, ranks)
    if ranks.rank == 0:
        print_inside(transport, idle, memory)
    return {
        "transport_us": transport,
        "idle": {name: asdict(found) for name, found in idle.items()},
        "activation_bytes": {name: [asdict(of_rank) for of_rank in found] for name, found in memory.items()},
    }


def print_inside(transport: Series, idle: Mapping[str, Idle], memory: Mapping[str, list[Activations]]) -> None:
    rows = [[name, f"{median(values):.0f}", spread(values)] for name, values in transport.items()]
    print_table(["output of a stage under way", "us", "range"], rows)
    rows = []
    for name, found in idle.items():
        cells = [f"{median(found.measured):.1%}", f"{median(found.simulated):.1%}"]
        cells.append(f"{ratio(found.measured, found.simulated):.2f}")
        rows.append([name, *cells, spread([100 * part for part in found.measured])])
    if rows:
        print_table(["idle time", "measured", "simulated", "ratio", "range, %"], rows)
    mib, rows = 2**20, []
    for name, found_of_ranks in memory.items():
        for rank, found in enumerate(found_of_ranks):
            sizes = [found.at_actions, found.simulated, found.peak]
            cells = [f"{size / mib:.1f}" for size in sizes]
            rows.append([f"{name}, rank {rank}", *cells[:2], f"{found.at_actions / found.simulated:.2f}", cells[2]])
    if rows:
        print_table(["activations, MiB", "measured", "simulated", "ratio", "peak within actions"], rows)


def measure(arguments: argparse.Namespace) -> None:
    ranks, task, turns = Ranks(), make_task(arguments), Turns()
    torch.set_num_threads(1)
    turns.warm_up(ALONE, alone, task, arguments.warm_up)
    for name in arguments.engines:
        turns.warm_up(name, ENGINES[name].build, task, arguments.warm_up)
    turns.share_losses(ranks)
    for _ in range(arguments.rounds):
        for name in turns.pipelines:
            turns.time(name, arguments.steps, ranks)
    if ranks.rank == 0:
        parameters = sum(p.numel() for p in task.layers(range(len(task.costs))).parameters())
        bounds = " | ".join(f"{b.start}-{b.stop - 1}" for b in task.bounds(ranks.world_size))
        print(f"{parameters:,} parameters, layers {bounds}, {ranks.world_size} ranks, "
              f"{task.micro_batches} micro-batches of {task.size} x {task.length} tokens; "
              f"{arguments.rounds} rounds of {arguments.steps} steps; "
              f"DeepSpeed's Adam: {task.deepspeed_adam}\n")  # fmt: skip
        print_times(turns)
        print_warnings(turns.losses)
    result: dict[str, Any] = {"arguments": settings_of(arguments), "ranks": ranks.world_size, "ms": turns.ms}
    result |= {"cpu_ms": turns.cpu_ms, "losses": turns.losses, "missing": turns.missing}
    result |= look_inside(turns.pipelines, task, arguments.rounds, ranks)
    for pipeline in turns.pipelines.values():
        pipeline.close()
    if ranks.rank == 0:
        write_json(arguments.json, result)
    ranks.finish()


def main() -> None:
    measure(parse_arguments())


if __name__ == "__main__":
    main()
