"""Sinks that are files of text: JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from partita.files import file_to_write
from partita.monitor.records import Record, events_of

METRICS_NAME = "metrics.jsonl"
EARLIER = "earlier-"  # and a number: folders with what runs have left that began at step 0, too


class JsonLinesSink:
    """`metrics.jsonl`: one object for each record, {"step", "samples", "time", and the values}.

    What a program logs at a step has an object of its own. Values that are not finite are null.

    Raises:
        OSError: the folder cannot be made or written.
    """

    name = "monitor"

    def __init__(self, folder: Path) -> None:
        self._path = _usable(folder) / METRICS_NAME
        file_to_write(self._path)

    def go_on_from(self, step: int, samples: int) -> None:
        """Objects of later steps are removed."""
        if step:
            _keep_lines(self._path, lambda line: _step_of(line) <= step)
        else:
            _set_aside(self._path.parent, [self._path])

    def write(self, records: Sequence[Record]) -> None:
        """Appends them, in one write."""
        _append(self._path, "".join(_json_line(record) for record in records))

    def close(self) -> None:
        """Every write has closed the file."""


class CsvSink:
    """A file for each value: `Train_Samples_train_loss.csv`, of rows (samples, value) under a header.

    Raises:
        OSError: the folder cannot be made or written.
    """

    name = "csv_monitor"

    def __init__(self, folder: Path) -> None:
        self._folder = _usable(folder)
        self._begun: set[Path] = set()  # files with a header

    def go_on_from(self, step: int, samples: int) -> None:
        """Rows of later samples are removed."""
        files = [path for path in sorted(self._folder.glob("*.csv")) if _is_own_table(path)]
        self._begun.clear()
        if not step:
            _set_aside(self._folder, files)
            return
        for path in files:
            _keep_lines(path, lambda line: line.startswith("step,") or _samples_of(line) <= samples)
            if path.stat().st_size:
                self._begun.add(path)

    def write(self, records: Sequence[Record]) -> None:
        """Appends rows, in one write per file."""
        rows: dict[str, list[list[object]]] = {}
        for record in records:
            for name, value in events_of(record).items():
                rows.setdefault(name, []).append([record.samples, value])
        for name, of_name in rows.items():
            path = self._folder / (re.sub(r"[^\w.\-]", "_", name) + ".csv")
            if path not in self._begun:
                of_name.insert(0, ["step", name.rpartition("/")[2]])
                self._begun.add(path)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(of_name)
            _append(path, text.getvalue())

    def close(self) -> None:
        """Every write has closed its files."""


def _usable(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"'{folder}' cannot be written")
    return folder


def _append(path: Path, text: str) -> None:
    with open(file_to_write(path), "ab", buffering=0) as file:
        data = memoryview(text.encode())
        while data:
            data = data[file.write(data) :]


def _keep_lines(path: Path, keeps: Callable[[str], bool]) -> None:
    """The file has only lines that are whole and wanted. It is replaced in one step."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith("\n") and keeps(line)]
    if len(kept) < len(lines):
        beside = file_to_write(path.with_name(path.name + ".new"))
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, file_to_write(path))


def _is_own_table(path: Path) -> bool:
    """Whether the file begins with the header of a sink: a program may keep tables of its own beside."""
    try:
        with open(path, "rb") as file:
            return file.read(len(b"step,")) == b"step,"
    except OSError:
        return False


def _set_aside(folder: Path, files: Sequence[Path]) -> None:
    """What another run has left moves into a folder of its own."""
    files = [path for path in files if path.exists()]
    if not files:
        return
    number = 1
    while (folder / f"{EARLIER}{number}").exists():
        number += 1
    (folder / f"{EARLIER}{number}").mkdir()
    for path in files:
        path.rename(folder / f"{EARLIER}{number}" / path.name)


def _json_line(record: Record) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record.values.items()}
    about = {"step": record.step, "samples": record.samples, "time": round(record.time_s, 3)}
    return json.dumps(about | values, allow_nan=False) + "\n"


def _step_of(line: str) -> float:
    """Infinity: the line is none of ours."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _samples_of(line: str) -> float:
    try:
        return int(line.partition(",")[0])
    except ValueError:
        return math.inf
