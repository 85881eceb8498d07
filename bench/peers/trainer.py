"""Trainer and Accelerate over Partita: its own classes, its alias of DeepSpeed, DeepSpeed itself, and DDP.

    python bench/peers/trainer.py [--stages 1,3] [--libraries trainer] [--engines partita,alias]

Each training has processes of its own (what `deepspeed` is, is decided when a process starts), and they take turns:
A B C, A B C, ... All have the same model, data, AdamW and clipping, and log the loss of each step. The time of a step
is the median over steps after the first ones, on the slowest rank; ratios are medians over rounds. Losses are compared
with those of DDP, step by step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from report import print_ratios, print_table, settings_of, spread, write_json
from trainer_run import ENGINES, LIBRARIES

FIRST_STEPS = 4  # that are not timed
LOSS_TOLERANCE = 1e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=lambda text: [int(part) for part in text.split(",")], default=[1, 3])
    parser.add_argument("--libraries", type=lambda text: text.split(","), default=list(LIBRARIES))
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def train(given: argparse.Namespace, library: str, engine: str, stage: int) -> dict[str, Any]:
    """The losses and times of one training; ends this program, with what the training wrote, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.ranks)]
        what = ["--library", library, "--engine", engine, "--stage", str(stage), "--steps", str(given.steps)]
        program = str(Path(__file__).with_name("trainer_run.py"))
        done = subprocess.run(
            [*launch, program, *what, "--json", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{library} over {engine}, stage {stage}:\n{done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def compare(given: argparse.Namespace, library: str, stage: int, engines: list[str]) -> dict[str, Any]:
    """All engines in turns: times by round, losses, and the largest difference to DDP's losses."""
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    losses: dict[str, list[float]] = {}
    for _, engine in product(range(given.rounds), engines):
        course = train(given, library, engine, stage)
        times[engine].append(median(course["ms"][FIRST_STEPS:]))
        losses[engine] = course["losses"]
    reference = losses.get("ddp") or losses[engines[0]]
    differences = {
        engine: max(abs(a - b) for a, b in zip(values, reference, strict=True)) for engine, values in losses.items()
    }
    return {"library": library, "stage": stage, "ms": times, "losses": losses, "differences": differences}


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['library']}, stage {result['stage']}\n")
    times, losses, differences = result["ms"], result["losses"], result["differences"]
    rows = [
        [name, f"{median(ms):.1f}", spread(ms), f"{losses[name][-1]:.6f}", f"{differences[name]:.1e}"]
        for name, ms in times.items()
    ]
    print_table(["engine", "ms/step", "range", "last loss", "largest difference"], rows)
    print_ratios(times)
    for name, difference in differences.items():
        if difference > LOSS_TOLERANCE:
            print(f"WARNING: {name} does other work: a loss differs by {difference:.1e}")


def main() -> None:
    given = parse_arguments()
    engines = [name for name in given.engines if name != "deepspeed" or importlib.util.find_spec("deepspeed")]
    results = []
    for library, stage in product(given.libraries, given.stages):
        results.append(compare(given, library, stage, engines))
        print_result(results[-1])
    write_json(given.json, {"arguments": settings_of(given), "ranks": given.ranks, "results": results})


if __name__ == "__main__":
    main()
