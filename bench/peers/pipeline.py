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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from engines import NotAvailableError
from partita.pipeline import by_name
from pipeline_engines import ENGINES, Pipeline, alone
from pipeline_measures import Activations, Idle, activations, costs_of, idle_time, memory_costs, transport_us
from pipeline_task import ModelConfig, PipelineTask, costs_by_operations
from report import print_table, ratio, settings_of, spread, write_json

Series = Mapping[str, list[float]]

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


def warmed_up(name: str, task: PipelineTask, steps: int, ranks: Ranks) -> tuple[Pipeline, list[float]]:
    """A pipeline, and its losses."""
    pipeline = ENGINES[name].build(task)
    losses = [pipeline.step() for _ in range(steps)]
    return pipeline, [ranks.largest(-math.inf if math.isnan(loss) else loss) for loss in losses]


def ms_per_step(pipeline: Pipeline, steps: int, ranks: Ranks) -> float:
    """As the slowest rank sees it."""
    ranks.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        pipeline.step()
    return ranks.largest((time.perf_counter() - start) / steps * 1e3)


def print_times(
    times: Mapping[str, list[float]], losses: Mapping[str, list[float]], missing: Mapping[str, str]
) -> None:
    ours = {name: values for name, values in times.items() if name.startswith("partita")}
    best = min(ours, key=lambda name: median(ours[name]), default=None)
    rows = []
    for name, values in times.items():
        same = ENGINES[name].same_schedule
        to_same = f"{ratio(values, times[same]):.2f}" if same in times else "-"
        to_best = f"{ratio(values, times[best]):.2f}" if best else "-"
        cells = [f"{median(values):.1f}", spread(values), to_same, to_best, f"{losses[name][-1]:.5f}"]
        rows.append([name, *cells, ENGINES[name].about])
    rows += [[name, *"-----", reason] for name, reason in missing.items()]
    print_table(["engine", "ms/step", "range", "x Partita's", "x its best", "checked loss", "what it is"], rows)


def print_warnings(losses: Series, expected: float) -> None:
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
        way = "our gloo" if name.startswith("partita-gloo") else "shared memory"
        idle[name] = idle_time(pipeline, schedule, steps, median(transport[way]) / 1e6, ranks)
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
        cells = [f"{median(found.measured):.1%}", f"{found.simulated:.1%}", f"{found.ratio:.2f}"]
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
    ranks, task = Ranks(), make_task(arguments)
    torch.set_num_threads(1)
    reference = alone(task)
    expected = [reference.step() for _ in range(arguments.warm_up)][-1]
    pipelines: dict[str, Pipeline] = {}
    losses: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name in arguments.engines:
        try:
            pipelines[name], losses[name] = warmed_up(name, task, arguments.warm_up, ranks)
        except (NotAvailableError, NotImplementedError) as error:
            missing[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    times_alone = []
    for _ in range(arguments.rounds):
        times_alone.append(ms_per_step(reference, 1, ranks))
        for name, pipeline in pipelines.items():
            times[name].append(ms_per_step(pipeline, arguments.steps, ranks))
    if ranks.rank == 0:
        parameters = sum(p.numel() for p in task.layers(range(len(task.costs))).parameters())
        bounds = " | ".join(f"{b.start}-{b.stop - 1}" for b in task.bounds(ranks.world_size))
        print(f"{parameters:,} parameters, layers {bounds}, {ranks.world_size} ranks, "
              f"{task.micro_batches} micro-batches of {task.size} x {task.length} tokens; "
              f"{arguments.rounds} rounds of {arguments.steps} steps; "
              f"DeepSpeed's Adam: {task.deepspeed_adam}")  # fmt: skip
        print(f"the whole model in one process (on each rank at once): {median(times_alone):.1f} ms, "
              f"loss {expected:.5f}\n")  # fmt: skip
        print_times(times, losses, missing)
        print_warnings(losses, expected)
    result: dict[str, Any] = {"arguments": settings_of(arguments), "ranks": ranks.world_size}
    result |= {"ms": times, "ms_alone": times_alone, "losses": losses, "missing": missing, "reference_loss": expected}
    result |= look_inside(pipelines, task, arguments.rounds, ranks)
    for pipeline in pipelines.values():
        pipeline.close()
    if ranks.rank == 0:
        write_json(arguments.json, result)
    ranks.finish()


def main() -> None:
    measure(parse_arguments())


if __name__ == "__main__":
    main()
