"""What it costs to know who waits for whom: this build against one without, in turns, and its share of a step.

    torchrun --nproc-per-node 2 bench/peers/waits_overhead.py [--without _core.so ...]

A step's share is worked out: the clock reads that were added, at most two for each collective, and what the step's
ledger takes, both in time of the processor; of the time of a step, measured beside it. With `--without`, another build
of the native module (of the same interface but for the waits), collectives of both builds take turns in pairs of
processes that last for one turn each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

COLLECTIVES = {"barrier": 0, "all-reduce of 4 KiB": 1024, "all-reduce of 1 MiB": 262144}
CLOCK_READS = 200_000
LEDGERS = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", type=Path, help="the native module of a build that does not know who waits")
    parser.add_argument("--turns", type=int, default=5, help="of each build")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turn", nargs=4, help=argparse.SUPPRESS)  # build, rank, store, result: one process of a turn
    arguments = parser.parse_args()
    if arguments.turn:
        one_turn(*arguments.turn)
        return
    from environment import Ranks
    from report import settings_of, write_json

    ranks = Ranks()
    result: dict[str, Any] = {"options": settings_of(arguments), "step": share_of_step(arguments.steps)}
    ranks.barrier()
    if ranks.rank == 0:
        if arguments.without:
            result["collectives"] = in_turns(arguments.without.resolve(), arguments.turns)
        print(json.dumps({key: result[key] for key in result if key != "options"}, indent=2))
        write_json(arguments.json, result)


def share_of_step(steps: int) -> dict[str, float]:
    """Of a small language model's step, on this rank."""
    import partita
    import torch
    from partita.comm import ProcessGrid, WaitsLedger, world_communicator
    from torch import nn

    torch.manual_seed(0)
    layer = [nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(4096, 256), *layer, nn.Linear(256, 4096))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 2},
        "comms_logger": {"enabled": True},
        "steps_per_print": 0,
        "monitor": {"flops": False},
    }
    engine, *_ = partita.initialize(model=model, config=config)
    words = torch.randint(4096, (2, 64))
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.backward(engine(words).float().logsumexp(-1).mean())
        engine.step()
        times.append(time.perf_counter() - begin)
    collectives = sum(row.count for row in engine.log_comms()) / steps
    engine.destroy()

    grid = ProcessGrid(world_communicator)
    ledger = WaitsLedger(grid)
    place = torch.zeros(ledger.slots, dtype=torch.float64)
    ledger_s = _seconds_each(LEDGERS, lambda: place.copy_(torch.tensor(ledger.take(), dtype=torch.float64)))
    clock_s = _seconds_each(CLOCK_READS, time.perf_counter)
    grid.close()
    step_s = median(times)
    added_s = 2 * collectives * clock_s + ledger_s
    return {
        "step_ms": step_s * 1e3,
        "collectives_per_step": collectives,
        "clock_read_ns": clock_s * 1e9,
        "ledger_us": ledger_s * 1e6,
        "added_us": added_s * 1e6,
        "share": added_s / step_s,
    }


def _seconds_each(count: int, call: Any) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(count // 5):
            call()
        best = min(best, (time.thread_time() - begin) / (count // 5))
    return best


def in_turns(without: Path, turns: int) -> dict[str, dict[str, Any]]:
    """Microseconds of each build by turn, and the median over turns of their ratio."""
    found: dict[str, dict[str, list[float]]] = {name: {"with": [], "without": []} for name in COLLECTIVES}
    for turn in range(turns):
        builds = [("with", ""), ("without", str(without))]
        for build, path in builds if turn % 2 else reversed(builds):
            for name, microseconds in pair(path).items():
                found[name][build].append(microseconds)
    ratios = {
        name: [a / b for a, b in zip(times["with"], times["without"], strict=True)] for name, times in found.items()
    }
    return {
        name: {
            "with_us": median(times["with"]),
            "without_us": median(times["without"]),
            "ratio": median(ratios[name]),
            "ratios": ratios[name],
        }
        for name, times in found.items()
    }


def pair(build: str) -> dict[str, float]:
    """Two processes of a build; what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--turn", build, str(rank), f"{folder}/store", str(result)],
                env=environment,
            )
            for rank in range(2)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit("a process of a turn failed")
        return dict(json.loads(result.read_text()))


def one_turn(build: str, rank: str, store: str, result: str) -> None:
    """One process. build: a native module that takes the place of the installed one; empty: that one."""
    if build:
        spec = importlib.util.spec_from_file_location("partita._core", build)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["partita._core"] = module
        spec.loader.exec_module(module)
    import torch
    import torch.distributed as dist
    from partita.comm import communicator_of

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    assert dist.group.WORLD is not None
    communicator = communicator_of(dist.group.WORLD, "shared_memory", timedelta(seconds=60))
    times = {}
    for name, numel in COLLECTIVES.items():
        buffer = communicator.empty(numel, torch.float32)
        rounds = 20 if numel > 10_000 else 50
        batches = []
        for _ in range(200):
            communicator.barrier()
            begin = time.perf_counter()
            for _ in range(rounds):
                if numel:
                    communicator.all_reduce(buffer).wait()
                else:
                    communicator.barrier()
            batches.append((time.perf_counter() - begin) / rounds * 1e6)
        times[name] = min(batches)  # of a shared machine, the quiet moments
    if rank == "0":
        Path(result).write_text(json.dumps(times))
    communicator.barrier()
    communicator.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
