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

WIDTH, LAYERS, TOKENS = 448, 8, 320  # a step of about 50 ms on one core


def engine_of(config: dict[str, Any]) -> partita.Engine:
    """The same model each time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Embedding(256, WIDTH)]
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 256))
    about = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    return partita.Engine(model, config={**about, **config})


def turn(engine: partita.Engine, ids: Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of a step: of the clock, and of the processor in all threads."""
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(engine(ids).flatten(0, 1), ids.flatten())
        engine.backward(loss)
        engine.step()
    return (time.perf_counter() - begin) / steps * 1e3, (time.process_time() - used) / steps * 1e3


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
    clock: dict[str, list[float]] = {"without": [], "all sinks": []}
    processor: dict[str, list[float]] = {name: [] for name in clock}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
        engines = [engine_of({}), engine_of(everywhere(Path(folder) / "turns"))]
        for engine in engines:
            exits.callback(engine.destroy)
            turn(engine, ids, 5)
        for _ in range(arguments.rounds):
            for engine, name in zip(engines, clock, strict=True):
                of_clock, of_processor = turn(engine, ids, arguments.steps)
                clock[name].append(of_clock)
                processor[name].append(of_processor)
        alone_ms = median(cost_ms(Path(folder) / f"alone{i}", 500) for i in range(5))
    rows = [
        [name, f"{median(clock[name]):.2f}", spread(clock[name]), f"{median(processor[name]):.2f}"] for name in clock
    ]
    print_table(["", "ms/step", "range", "of the processor"], rows)
    ratios = {name: ratio(of["all sinks"], of["without"]) for name, of in (("clock", clock), ("processor", processor))}
    print(f"all sinks over without, by round: {ratios['clock']:.4f}; of the processor {ratios['processor']:.4f}")
    print(f"processor time of all sinks, beside a step of almost no work: {alone_ms:.3f} ms per step")
    result = {"ms": clock, "processor_ms": processor, "ratios": ratios, "alone_ms": alone_ms}
    write_json(arguments.json, {"settings": settings_of(arguments), **result})


if __name__ == "__main__":
    main()
