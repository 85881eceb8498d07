"""What sinks have written, read back by other means than those that wrote it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

JOB = "DeepSpeedJobName"


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, by a strict reader."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def own_rows(folder: Path) -> list[dict[str, Any]]:
    """Those of the engine: each has a gradient norm."""
    return [row for row in rows(folder) if "grad_norm" in row]


def table(folder: Path, name: str) -> tuple[list[str], list[tuple[int, float]]]:
    """Header and rows of a CSV file."""
    with open(folder / f"{name}.csv", newline="") as file:
        header, *lines = csv.reader(file)
    return header, [(int(x), float(y)) for x, y in lines]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the event files in a folder, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def everywhere(folder: Path) -> dict[str, Any]:
    """The sections of a config that writes with all sinks that need no service."""
    return {
        "monitor": {"dir": str(folder)},
        "tensorboard": {"enabled": True, "output_path": str(folder / "board")},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "tables")},
    }
