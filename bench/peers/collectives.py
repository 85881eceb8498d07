"""Collectives over shared memory beside gloo's own, and beside a plain copy of as many bytes in each process.

    torchrun --nproc-per-node 2 bench/peers/collectives.py [--dtypes f32,bf16] [--sizes-kib 64,4096] [--json FILE]

The buffers of a size take turns within one round; the slowest rank counts, and ratios are medians over rounds. The copy
moves what a rank has to move: with N ranks and n bytes, a reduce-scatter reads n and writes n/N, an all-gather reads
and writes (N-1)/N n, an all-reduce does one after the other; a copy of b bytes reads b and writes b.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
import torch.distributed as dist
from partita.comm import Communicator, TorchCommunicator, communicator_of
from report import print_table, ratio, settings_of, write_json
from torch import Tensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COLLECTIVES = ("reduce_scatter", "all_gather", "all_reduce")
SECONDS_PER_TURN = 0.05


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["f32", "bf16"])
    sizes = [64, 512, 4096, 32768, 131072, 262144]
    parser.add_argument("--sizes-kib", type=lambda text: [int(part) for part in text.split(",")], default=sizes)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class Subject:
    """One way to do a collective, or the copy that it is measured against."""

    name: str
    run: Callable[[], None]


def gloo(name: str, buffer: Tensor, ranks: Ranks) -> Callable[[], None]:
    """torch.distributed's own call for the same in-place collective."""
    own = buffer.chunk(ranks.world_size)[ranks.rank]
    if name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(own, buffer)
    if name == "all_gather":
        return lambda: dist.all_gather_into_tensor(buffer, own.clone())
    return lambda: dist.all_reduce(buffer)


def through(communicator: Communicator, name: str, buffer: Tensor) -> Callable[[], None]:
    call = getattr(communicator, name)
    return lambda: call(buffer).wait()


def copied_bytes(name: str, nbytes: int, world_size: int) -> int:
    """The size of a copy that moves as many bytes as a rank must in this collective."""
    reduce_scatter = (nbytes + nbytes // world_size) // 2
    all_gather = nbytes - nbytes // world_size
    return {"reduce_scatter": reduce_scatter, "all_gather": all_gather, "all_reduce": reduce_scatter + all_gather}[name]


def copy_of(nbytes: int) -> Callable[[], None]:
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    return lambda: target.copy_(source)  # type: ignore[func-returns-value]


def subjects_of(name: str, nbytes: int, dtype: torch.dtype, ranks: Ranks, shared: Communicator) -> list[Subject]:
    numel = nbytes // dtype.itemsize
    ours = shared.empty(numel, dtype).zero_()
    plain = torch.zeros(numel, dtype=dtype)
    world = dist.group.WORLD
    assert world is not None
    return [
        Subject("copy", copy_of(copied_bytes(name, nbytes, ranks.world_size))),
        Subject("shared memory", through(shared, name, ours)),
        Subject("foreign buffer", through(shared, name, plain)),
        Subject("gloo", gloo(name, plain, ranks)),
        Subject("our gloo", through(TorchCommunicator(world), name, plain)),
    ]


def seconds_of(subject: Subject, times: int, shared: Communicator) -> float:
    """Per run, on this rank; all ranks begin together."""
    shared.barrier()
    start = time.perf_counter()
    for _ in range(times):
        subject.run()
    return (time.perf_counter() - start) / times


def measure(subjects: list[Subject], rounds: int, ranks: Ranks, shared: Communicator) -> dict[str, list[float]]:
    """Microseconds of the slowest rank, one per round."""
    times = {}
    for subject in subjects:
        seconds_of(subject, 2, shared)  # first touches
        times[subject.name] = max(1, int(SECONDS_PER_TURN / ranks.largest(seconds_of(subject, 2, shared))))
    result: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for _ in range(rounds):
        for subject in subjects:
            result[subject.name].append(1e6 * ranks.largest(seconds_of(subject, times[subject.name], shared)))
    return result


def latencies(rounds: int, ranks: Ranks, shared: Communicator) -> dict[str, list[float]]:
    value = torch.zeros(1024)
    subjects = [
        Subject("barrier", shared.barrier),
        Subject("barrier, gloo", dist.barrier),
        Subject("4 KiB all_reduce", through(shared, "all_reduce", value)),
        Subject("4 KiB all_reduce, gloo", lambda: dist.all_reduce(value)),
    ]
    return measure(subjects, rounds, ranks, shared)


def row_of(name: str, nbytes: int, dtype: str, times: dict[str, list[float]]) -> list[str]:
    ours = times["shared memory"]
    cells = [f"{median(times[subject]):.0f}" for subject in times]
    ratios = [ratio(times["copy"], ours), ratio(times["gloo"], ours), ratio(times["our gloo"], ours)]
    return [f"{name} {dtype}", f"{nbytes // 1024}", *cells, *(f"{value:.2f}" for value in ratios)]


def main() -> None:
    arguments = parse_arguments()
    ranks = Ranks()
    torch.set_num_threads(1)
    world = dist.group.WORLD
    assert world is not None
    shared = communicator_of(world, "shared_memory", timedelta(seconds=60))
    fast = latencies(arguments.rounds, ranks, shared)
    results = {}
    rows = []
    for dtype in arguments.dtypes:
        for name in COLLECTIVES:
            for kib in arguments.sizes_kib:
                subjects = subjects_of(name, kib * 1024, DTYPES[dtype], ranks, shared)
                times = results[f"{name} {dtype} {kib} KiB"] = measure(subjects, arguments.rounds, ranks, shared)
                rows.append(row_of(name, kib * 1024, dtype, times))
    if ranks.rank == 0:
        print(f"{ranks.world_size} ranks, microseconds, {arguments.rounds} rounds in turns\n")
        print_table(["latency", "us"], [[name, f"{median(times):.1f}"] for name, times in fast.items()])
        header = ["collective", "KiB", "copy", "shared", "foreign", "gloo", "our gloo"]
        print_table([*header, "of copy speed", "x gloo", "x our gloo"], rows)
        write_json(
            arguments.json,
            {"arguments": settings_of(arguments), "ranks": ranks.world_size, "latency_us": fast, "us": results},
        )
    shared.close()
    ranks.finish()


if __name__ == "__main__":
    main()
