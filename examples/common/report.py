"""What a training run leaves behind beside the weights: a table of metrics, a picture of the losses."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9541e", "#2e8b57", "#5f6368"


@dataclass(frozen=True)
class Curve:
    """points: (step, loss)."""

    name: str
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """One line of metrics.csv; None where nothing was measured."""

    step: int
    loss: float | None  # nats per token, mean over ranks and over the steps since the row before
    val_loss: float | None  # nats per token
    bits_per_byte: float | None  # of the validation
    tokens_per_s: float | None  # of all ranks, validation not counted
    lr: float  # of the step that follows
    grad_norm: float | None  # of the step's mean gradient, before clipping
    loss_scale: float
    skipped_steps: int


class MetricsFile:
    """Rows of a run, written as they come; `file` None keeps them in memory only.

    Args:
        goes_on_from: the step whose checkpoint the run goes on from; the rows of `file` up to it stay.
    """

    def __init__(self, file: Path | None, *, goes_on_from: int | None = None) -> None:
        earlier = [] if file is None or goes_on_from is None else read_rows(file, goes_on_from)
        self.rows: list[Row] = []
        self._stream = None if file is None else file.open("w", newline="", encoding="utf-8")
        self._writer = self._stream and csv.DictWriter(self._stream, [field.name for field in fields(Row)])
        if self._writer:
            self._writer.writeheader()
        for row in earlier:
            self.add(row)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream:
            self._stream.close()

    def add(self, row: Row) -> None:
        """Floats are written so that they read back as the same number."""
        self.rows.append(row)
        if self._stream and self._writer:
            self._writer.writerow(asdict(row))
            self._stream.flush()


def read_rows(file: Path, last: int) -> list[Row]:
    """The rows of an earlier start up to step `last`; none where there is no such table."""
    if not file.exists():
        return []
    whole = {"step", "skipped_steps"}
    with file.open(newline="", encoding="utf-8") as stream:
        try:
            rows = [
                Row(**{key: int(text) if key in whole else float(text) if text else None for key, text in line.items()})  # type: ignore[arg-type]
                for line in csv.DictReader(stream)
            ]
        except (TypeError, ValueError):  # another table, or one that was cut off
            return []
    return [row for row in rows if row.step <= last]


def plot_losses(
    rows: list[Row],
    title: str,
    file: Path,
    *,
    bytes_per_token: float,
    others: Sequence[Curve] = (),
    baseline: tuple[str, float] | None = None,
) -> None:
    """Training and validation loss over steps, in nats per token on the left and bits per byte on the right.

    Args:
        others: losses of other runs.
        baseline: the name and the loss of what is to be beaten.
    """

    def bits(nats: Any) -> Any:
        return nats / (bytes_per_token * math.log(2))

    trained = [(row.step, row.loss) for row in rows if row.loss is not None]
    held_out = [(row.step, row.val_loss) for row in rows if row.val_loss is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*trained, strict=True), color=BLUE, linewidth=1.2, alpha=0.8, label="training")
    end = f"validation; at the end {held_out[-1][1]:.3f} nats = {bits(held_out[-1][1]):.3f} bits per byte"
    axes.plot(*zip(*held_out, strict=True), color=ORANGE, linewidth=1.4, marker="o", markersize=4.5, label=end)
    for curve in others:
        name = f"{curve.name}; {curve.points[-1][1]:.3f} nats"
        axes.plot(*zip(*curve.points, strict=True), color=GREEN, linewidth=1.4, marker="s", markersize=4, label=name)
    if baseline is not None:
        name = f"{baseline[0]}; {baseline[1]:.3f} nats"
        axes.axhline(baseline[1], color=GREY, linewidth=1.2, linestyle="--", label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.02)
    finite = [loss for _, loss in trained + held_out if math.isfinite(loss)]
    axes.set_ylim(bottom=math.floor(2 * min(finite, default=0)) / 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = axes.secondary_yaxis("right", functions=(bits, lambda value: value * bytes_per_token * math.log(2)))
    right.set_ylabel("bits per byte")
    axes.spines["top"].set_visible(False)
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes, right):
        axis.tick_params(colors=GREY)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(file)
