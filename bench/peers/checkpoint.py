"""Saving and loading the states of one run: seconds, and bytes per second beside raw writes of the same bytes.

    torchrun --nproc-per-node 2 bench/peers/checkpoint.py [--layers 12] [--folder DIR] [--ways raw,partita]

GPT-2 (12 layers: 124 million parameters) with bf16 weights, fp32 masters and Adam's moments in ZeRO stage 2: 14 bytes
per parameter, of which each rank has its part. Every way writes these bytes and has them on the disk (fsync) when it
returns:

    raw          each rank writes its part into a preallocated file of its own, one pwrite after the other
    partita      engine.save_checkpoint(), and load_checkpoint()
    torch        torch.save() of a rank's part, and torch.load()
    safetensors  safetensors.torch.save_file(), and load_file() copied into the part, as it maps files and reads nothing
    dcp          torch.distributed.checkpoint.save() and load(), each rank with its part
    deepspeed    engine.save_checkpoint() and load_checkpoint() in stage 2; rank 0 then syncs all files

Partita writes past the page cache, so all files are read once before a load is measured: every way loads from there.
The ways take turns; medians and ratios are over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from report import print_table, settings_of, write_json

Way = tuple[Callable[[Path], object], Callable[[Path], object]]
CHUNK = 8 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="", help="some of them, separated by commas; without it: all")
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


def into_page_cache(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass


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


def gpt2(layers: int) -> torch.nn.Module:
    """With random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers))


def stage2(**changes: Any) -> dict[str, Any]:
    """A config that both engines take."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW"},
        "steps_per_print": 2**31 - 1,
        **changes,
    }


def trained(library: Any, model: torch.nn.Module) -> Any:
    """An engine of Partita or DeepSpeed after one step, so that all states are there."""
    if library.__name__ == "deepspeed":
        optimizer = torch.optim.AdamW(model.parameters())
        config = {key: value for key, value in stage2().items() if key != "optimizer"}
        engine, *_ = library.initialize(model=model, optimizer=optimizer, config=config)
    else:
        engine, *_ = library.initialize(model=model, config=stage2())
    tokens = torch.randint(0, 50257, (1, 32))
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    return engine


def ways_of(ranks: Ranks, arguments: argparse.Namespace) -> tuple[dict[str, Way], int]:
    """Saving and loading by name, and the number of parameters."""
    import partita
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    model = gpt2(arguments.layers)
    numel = sum(p.numel() for p in model.parameters())
    engine = trained(partita, model)
    parts = parts_of(ranks.world_size, numel)
    mine = f"{ranks.rank}.safetensors"

    def torch_save(folder: Path) -> None:
        torch.save(parts, folder / f"{ranks.rank}.pt")
        sync(folder / f"{ranks.rank}.pt")

    def safetensors_save(folder: Path) -> None:
        safetensors.torch.save_file(parts, folder / mine)
        sync(folder / mine)

    def safetensors_load(folder: Path) -> None:
        for name, values in safetensors.torch.load_file(folder / mine).items():
            parts[name].copy_(values)

    named = {f"{name}.{ranks.rank}": part for name, part in parts.items()}
    ways: dict[str, Way] = {
        "raw": (lambda f: raw_save(f, ranks.rank, parts), lambda f: raw_load(f, ranks.rank, parts)),
        "partita": (lambda f: engine.save_checkpoint(f, "tag"), lambda f: engine.load_checkpoint(f, "tag")),
        "torch": (torch_save, lambda f: torch.load(f / f"{ranks.rank}.pt")),
        "safetensors": (safetensors_save, safetensors_load),
        "dcp": (lambda f: dcp.save(named, checkpoint_id=f), lambda f: dcp.load(named, checkpoint_id=f)),
    }
    wanted = [name for name in arguments.ways.split(",") if name] or [*ways, "deepspeed"]
    if "deepspeed" in wanted:
        try:
            import deepspeed
        except ImportError:
            wanted.remove("deepspeed")
        else:
            peer = trained(deepspeed, gpt2(arguments.layers))

            def deepspeed_save(folder: Path) -> None:
                peer.save_checkpoint(folder, "tag")
                ranks.barrier()
                if ranks.rank == 0:
                    for path in (folder / "tag").iterdir():
                        sync(path)

            ways["deepspeed"] = (deepspeed_save, lambda f: peer.load_checkpoint(f, "tag"))
    return {name: ways[name] for name in wanted}, numel


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
            if ranks.rank == 0:
                into_page_cache(place)
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
