"""Medians, tables and JSON for the peer benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of value / base.

    Both were taken in the same round, so a machine that slows down for a while slows both.
    """
    return median(value / other for value, other in zip(values, base, strict=True))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; text (the first and, where it has spaces, the last) on the left."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    last_is_text = any(" " in row[-1] for row in rows)
    for first, *middle, last in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, middle, widths[1:-1])]
        print("  ".join([*cells, last if last_is_text else last.rjust(widths[-1])]).rstrip())
    print(flush=True)


def print_ratios(times: Mapping[str, Sequence[float]]) -> None:
    """Every engine's time over every other's: row / column. Nothing for fewer than two engines."""
    names = list(times)
    if len(names) < 2:
        return
    rows = [[row, *(f"{ratio(times[row], times[column]):.2f}" for column in names)] for row in names]
    print_table(["row / column", *names], rows)


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f}-{max(values):.1f}"


def setting() -> dict[str, Any]:
    """What a reader needs to know of the machine and the versions to judge the figures."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": os.environ.get("OMP_NUM_THREADS", "unset"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "partita")},
    }


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run was asked for, without the path that its result goes to."""
    return {name: value for name, value in vars(arguments).items() if name != "json"}


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        from partita.files import file_to_write  # here, as some benchmarks measure this import

        path.parent.mkdir(parents=True, exist_ok=True)
        file_to_write(path).write_text(json.dumps({"setting": setting(), **result}, indent=2, default=str) + "\n")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
