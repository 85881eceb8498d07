"""What runs have recorded, read back: `metrics.jsonl`, or a folder of CSV files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from partita.monitor.files import METRICS_NAME

_PREFIX = "Train_Samples_"
_NAMES = {  # of our values, by what DeepSpeed calls them
    "train_loss": "loss",
    "elapsed_time_ms_forward": "forward_ms",
    "elapsed_time_ms_backward": "backward_ms",
    "elapsed_time_ms_step": "update_ms",
}


@dataclass(frozen=True)
class Series:
    """Values of one name, in the order of steps. What was not finite is left out.

    steps: None: the run has recorded samples only.
    """

    steps: list[int] | None
    samples: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunHistory:
    """All values of a run, by name."""

    name: str
    series: Mapping[str, Series]


def read_run(path: Path) -> RunHistory:
    """A run by the folder or the file that it has written.

    Raises:
        ValueError: there is no such place, or nothing recorded in it; names the path.
    """
    if not path.exists():
        raise ValueError(f"'{path}' does not exist: give the folder of a run (monitor.dir, or that of csv_monitor)")
    lines = path / METRICS_NAME if path.is_dir() else path
    tables = sorted(path.glob("*.csv")) if path.is_dir() else []
    if lines.is_file():
        series = _read_lines(lines)
    elif tables:
        series = {name: found for table in tables for name, found in [_read_table(table)]}
    else:
        raise ValueError(
            f"'{path}' has neither '{METRICS_NAME}' nor CSV files of csv_monitor: give the folder of a run"
        )
    series = {name: found for name, found in series.items() if found.values}
    if not series:
        raise ValueError(f"'{path}' holds no values yet")
    folder = path if path.is_dir() else path.parent
    return RunHistory(folder.resolve().name, series)


def _read_lines(path: Path) -> dict[str, Series]:
    steps: dict[str, list[int]] = {}
    samples: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for row in _rows(path):
        for name, value in row.items():
            if name in ("step", "samples", "time") or not isinstance(value, int | float):
                continue
            steps.setdefault(name, []).append(int(row["step"]))
            samples.setdefault(name, []).append(int(row["samples"]))
            values.setdefault(name, []).append(float(value))
    return {name: Series(steps[name], samples[name], values[name]) for name in values}


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """The last row may be one that is being written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"]), int(row["samples"])
        except (ValueError, TypeError, KeyError):
            if number == len(lines) and number > 1:
                return
            raise ValueError(f"'{path}', line {number}: is no record of a step") from None
        yield row


def _read_table(path: Path) -> tuple[str, Series]:
    samples, values = [], []
    for row in _cells(path):
        try:
            x, value = int(row[0]), float(row[1])
        except (ValueError, IndexError):
            continue  # a header: each run that writes into the folder adds one
        if math.isfinite(value):
            samples.append(x)
            values.append(value)
    name = path.stem.removeprefix(_PREFIX)
    return _NAMES.get(name, name), Series(None, samples, values)


def _cells(path: Path) -> Iterable[list[str]]:
    try:
        return list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from None
