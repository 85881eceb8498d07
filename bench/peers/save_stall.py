"""What training loses to a save that goes on beside it, in seconds and in memory.

    torchrun --nproc-per-node 2 bench/peers/save_stall.py [--layers 12] [--length 128] [--rounds 3] [--folder DIR]

GPT-2 with bf16 weights, fp32 masters and Adam's moments in ZeRO stage 2, trained by Partita in every row; the rows save
the same states of it:

    blocking     engine.save_checkpoint()
    beside       the same with checkpoint.async_save
    dcp          torch.distributed.checkpoint.async_save() of a rank's part, in a thread
    dcp process  the same, in a process

Per save: the call, what the first step after it takes longer than without a save (before its update, what is not
written is copied), what all later ones do until the checkpoint is there, and the sum of these (`stall`, of the slowest
rank). Peak: resident memory (VmHWM) above the peak of steps without a save, without what the peers' writers have in
other processes. Steps without a save are measured before each save.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from environment import Ranks, memory_mib  # isort: skip  (it sets up the process for torch)
import torch
from checkpoint import gpt2, parts_of, stage2
from report import print_table, settings_of, write_json

# Begins a save; returns what says whether it is over.
Begin = Callable[[Path], Callable[[], bool]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="without a save, before each save")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-stall"), help="on the disk to measure")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def engine_that(saves_beside: bool, layers: int) -> Any:
    import partita

    config = stage2(checkpoint={"async_save": saves_beside})
    return partita.initialize(model=gpt2(layers), config=config)[0]


def ways_of(ranks: Ranks, blocking: Any, beside: Any, numel: int) -> dict[str, tuple[Any, Begin]]:
    """By name: the engine that trains meanwhile, and how a save begins."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    def save_blocking(folder: Path) -> Callable[[], bool]:
        blocking.save_checkpoint(folder, "tag")
        return lambda: True

    def save_beside(folder: Path) -> Callable[[], bool]:
        beside.save_checkpoint(folder, "tag")
        return lambda: beside.save_under_way is None

    parts = {f"{name}.{ranks.rank}": part for name, part in parts_of(ranks.world_size, numel).items()}
    group = dist.new_group(backend="gloo")

    def save_dcp(kind: AsyncCheckpointerType) -> Begin:
        def begin(folder: Path) -> Callable[[], bool]:
            future: Any = dcp.async_save(parts, checkpoint_id=folder, process_group=group, async_checkpointer_type=kind)
            return lambda: all_done(ranks, future.done() and future.result() is not False)

        return begin

    return {
        "blocking": (blocking, save_blocking),
        "beside": (beside, save_beside),
        "dcp": (beside, save_dcp(AsyncCheckpointerType.THREAD)),
        "dcp process": (beside, save_dcp(AsyncCheckpointerType.PROCESS)),
    }


def all_done(ranks: Ranks, is_done: bool) -> bool:
    return ranks.largest(0.0 if is_done else 1.0) == 0


def step(engine: Any, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    return time.perf_counter() - start


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(
    ranks: Ranks, engine: Any, begin: Begin, folder: Path, tokens: torch.Tensor, steps: int
) -> dict[str, float]:
    reset_peak()
    plain = median(step(engine, tokens) for _ in range(steps))
    before = memory_mib("VmHWM")
    reset_peak()
    ranks.barrier()
    start = time.perf_counter()
    is_over = begin(folder)
    called = time.perf_counter() - start
    ends = []
    while True:
        step(engine, tokens)
        ends.append(time.perf_counter() - start)
        if is_over():
            break
    stall = time.perf_counter() - start - len(ends) * plain
    peak = memory_mib("VmHWM") - before
    return {
        "step": ranks.largest(plain),
        "call": ranks.largest(called),
        "steps": len(ends),
        "first step": ranks.largest(ends[0] - called - plain),
        "later": ranks.largest(ends[-1] - ends[0] - (len(ends) - 1) * plain),
        "stall": ranks.largest(stall),
        "peak MiB": ranks.largest(peak),
    }


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks()
    blocking, beside = (engine_that(way, arguments.layers) for way in (False, True))
    numel = sum(p.numel() for p in beside.module.parameters())
    tokens = torch.randint(0, 50257, (1, arguments.length))
    for engine in (blocking, beside):
        step(engine, tokens)
    folder: Path = arguments.folder.absolute()
    ways = ways_of(ranks, blocking, beside, numel)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, (engine, begin) in ways.items():
            place = folder / name.replace(" ", "-")
            if ranks.rank == 0:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
            ranks.barrier()
            found[name].append(measure(ranks, engine, begin, place, tokens, arguments.steps))
    if ranks.rank == 0:
        shutil.rmtree(folder)
        states = 14 * numel / ranks.world_size / 2**20
        print(f"{numel:,} parameters, {states:.0f} MiB of states per rank, {ranks.world_size} ranks")
        header = ["way", *found["beside"][0], "of a step", "peak / states"]
        rows = []
        for name, rounds in found.items():
            medians = {key: median(one[key] for one in rounds) for key in rounds[0]}
            of_step = median(one["stall"] / one["step"] for one in rounds)
            cells = [f"{value:.2f}" for value in medians.values()]
            rows.append([name, *cells, f"{of_step:.0%}", f"{medians['peak MiB'] / states:.2f}"])
        print_table(header, rows)
        write_json(arguments.json, {"arguments": settings_of(arguments), "states_mib": states, "rounds": found})
    ranks.finish()


if __name__ == "__main__":
    main()
