"""What all sinks that need no service cost a step together: engines with and without them, in turns.

python bench/peers/monitor_overhead.py [--rounds 9] [--steps 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import partita
import torch
from report import print_table, ratio, settings_of, spread, write_json
from torch import Tensor, nn

WIDTH, LAYERS, TOKENS = 512, 6, 384  # a step of about 50 ms on one core


def engine_of(config: dict[str, Any]) -> partita.Engine:
    """The same model each time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Embedding(256, WIDTH)]
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 256))
    about = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    return partita.Engine(model, config={**about, **config})


def turn(engine: partita.Engine, ids: Tensor, steps: int) -> float:
    """Milliseconds of a step."""
    begin = time.perf_counter()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(engine(ids).flatten(0, 1), ids.flatten())
        engine.backward(loss)
        engine.step()
    return (time.perf_counter() - begin) / steps * 1e3


def everywhere(folder: Path) -> dict[str, Any]:
    """All sinks that need no service, with the phases of a step and the MFU."""
    return {
        "wall_clock_breakdown": True,
        "monitor": {"dir": str(folder), "peak_tflops": 0.1},
        "tensorboard": {"enabled": True, "output_path": str(folder / "board")},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "tables")},
    }


def cost_ms(folder: Path, steps: int) -> float:
    """Processor time of a step of almost no work, more with sinks than without: of the loop and of the thread."""
    times = []
    for config in ({}, everywhere(folder)):
        model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
        about = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
        engine = partita.Engine(model, config={**about, **config})
        ids = torch.zeros(4, 2, dtype=torch.int64)
        turn(engine, ids, 20)
        begin = time.process_time()
        turn(engine, ids, steps)
        engine.destroy()  # writes what is left
        times.append((time.process_time() - begin) / steps * 1e3)
    return times[1] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60, help="in a row at each turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ids = torch.randint(256, (4, TOKENS // 4))
    times: dict[str, list[float]] = {"without": [], "all sinks": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
        engines = [engine_of({}), engine_of(everywhere(Path(folder) / "turns"))]
        for engine in engines:
            exits.callback(engine.destroy)
            turn(engine, ids, 5)
        for _ in range(arguments.rounds):
            for engine, row in zip(engines, times.values(), strict=True):
                row.append(turn(engine, ids, arguments.steps))
        alone_ms = median(cost_ms(Path(folder) / f"alone{i}", 500) for i in range(5))
    rows = [[name, f"{median(row):.2f}", spread(row)] for name, row in times.items()]
    print_table(["", "ms/step", "range"], rows)
    share = ratio(times["all sinks"], times["without"])
    print(
        f"all sinks over without, by round: {share:.4f}; processor time of all sinks alone: {alone_ms:.3f} ms per step"
    )
    write_json(
        arguments.json, {"settings": settings_of(arguments), "ms": times, "ratio": share, "processor_ms": alone_ms}
    )


if __name__ == "__main__":
    main()
