"""Saving and loading the states of one run: seconds, and bytes per second beside raw writes of the same bytes.

    torchrun --nproc-per-node 2 bench/peers/checkpoint.py [--layers 8] [--width 1024] [--folder DIR]

A stack of linear layers with bf16 weights, fp32 masters and Adam's moments in ZeRO stage 2: 14 bytes per parameter, of
which each rank has its part. Every way writes these bytes and has them on the disk (fsync) when it returns:

    raw          each rank writes its part into a preallocated file of its own, one pwrite after the other
    partita      engine.save_checkpoint(), and load_checkpoint()
    torch        torch.save() of a rank's part, and torch.load()
    safetensors  safetensors.torch.save_file() and load_file()
    dcp          torch.distributed.checkpoint.save() and load(), each rank with its part

Loading reads from the page cache. The ways take turns; medians and ratios are over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from report import print_table, settings_of, write_json

Way = tuple[Callable[[Path], object], Callable[[Path], object]]
CHUNK = 8 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-checkpoint"), help="on the disk to measure")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def parts_of(world_size: int, numel: int) -> dict[str, torch.Tensor]:
    """What one rank has of the run's states."""
    own = numel // world_size
    parts = {name: torch.ones(own) for name in ("weight", "exp_avg", "exp_avg_sq")}
    return {**parts, "model": torch.ones(own, dtype=torch.bfloat16)}


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def raw_save(folder: Path, rank: int, parts: dict[str, torch.Tensor]) -> None:
    fd = os.open(folder / f"raw-{rank}", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(fd, 0, sum(part.nbytes for part in parts.values()))
    offset = 0
    for part in parts.values():
        data = memoryview(part.view(torch.uint8).numpy())
        for begin in range(0, len(data), CHUNK):
            offset += os.pwrite(fd, data[begin : begin + CHUNK], offset)
    os.fsync(fd)
    os.close(fd)


def raw_load(folder: Path, rank: int, parts: dict[str, torch.Tensor]) -> None:
    fd = os.open(folder / f"raw-{rank}", os.O_RDONLY)
    offset = 0
    for part in parts.values():
        offset += os.preadv(fd, [memoryview(part.view(torch.uint8).numpy())], offset)
    os.close(fd)


def ways_of(ranks: Ranks, arguments: argparse.Namespace) -> tuple[dict[str, Way], int]:
    """Saving and loading by name, and the number of parameters."""
    import partita
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    width = arguments.width
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(arguments.layers)))
    numel = sum(p.numel() for p in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW"},
        "steps_per_print": 0,
    }
    engine, *_ = partita.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)).float().mean())
    engine.step()
    parts = parts_of(ranks.world_size, numel)
    mine = f"{ranks.rank}.safetensors"

    def torch_save(folder: Path) -> None:
        torch.save(parts, folder / f"{ranks.rank}.pt")
        sync(folder / f"{ranks.rank}.pt")

    def safetensors_save(folder: Path) -> None:
        safetensors.torch.save_file(parts, folder / mine)
        sync(folder / mine)

    named = {f"{name}.{ranks.rank}": part for name, part in parts.items()}
    ways: dict[str, Way] = {
        "raw": (lambda f: raw_save(f, ranks.rank, parts), lambda f: raw_load(f, ranks.rank, parts)),
        "partita": (lambda f: engine.save_checkpoint(f, "tag"), lambda f: engine.load_checkpoint(f, "tag")),
        "torch": (torch_save, lambda f: torch.load(f / f"{ranks.rank}.pt")),
        "safetensors": (safetensors_save, lambda f: safetensors.torch.load_file(f / mine)),
        "dcp": (lambda f: dcp.save(named, checkpoint_id=f), lambda f: dcp.load(named, checkpoint_id=f)),
    }
    return ways, numel


def seconds(ranks: Ranks, work: Callable[[Path], object], folder: Path) -> float:
    """Of the slowest rank."""
    ranks.barrier()
    start = time.perf_counter()
    work(folder)
    return ranks.largest(time.perf_counter() - start)


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks()
    ways, numel = ways_of(ranks, arguments)
    folder: Path = arguments.folder.absolute()
    times: dict[str, dict[str, list[float]]] = {name: {"save": [], "load": []} for name in ways}
    for _ in range(arguments.rounds):
        for name, (save, load) in ways.items():
            place = folder / name
            if ranks.rank == 0:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
            times[name]["save"].append(seconds(ranks, save, place))
            times[name]["load"].append(seconds(ranks, load, place))
    if ranks.rank == 0:
        shutil.rmtree(folder)
        nbytes = 14 * numel
        print(f"{numel:,} parameters, {nbytes / 1e9:.2f} GB, {ranks.world_size} ranks")
        rows = []
        for name, both in times.items():
            row = [name]
            for what in ("save", "load"):
                to_raw = median(r / t for r, t in zip(times["raw"][what], both[what], strict=True))
                row += [f"{median(both[what]):.2f}", f"{nbytes / 1e9 / median(both[what]):.2f}", f"{to_raw:.2f}"]
            rows.append(row)
        print_table(["way", "save s", "GB/s", "of raw", "load s", "GB/s", "of raw"], rows)
        write_json(arguments.json, {"arguments": settings_of(arguments), "bytes": nbytes, "seconds": times})
    ranks.finish()


if __name__ == "__main__":
    main()
