"""What a picture of runs shows: pure, from what they have recorded to curves with names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.monitor.history import RunHistory, Series

_SMOOTH_SHARE = 30  # of a curve, in the mean of a smooth line
_LOG_FROM = 10.0  # the range of a loss, largest over smallest, from which its axis is logarithmic
_OUTLIERS = 0.01  # of the values, that need not be in the picture


@dataclass(frozen=True)
class Curve:
    """A line of one run.

    name: in the legend; empty: the run has a line there already.
    run: its number, which is its colour.
    smooth: `y` as means; `y` itself is drawn faint then. None: points that are far apart, drawn as they are.
    """

    name: str
    run: int
    x: list[int]
    y: list[float]
    smooth: list[float] | None


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. low, high: what the axis shows."""

    label: str
    curves: list[Curve]
    is_log: bool
    low: float
    high: float


def by_samples(runs: Sequence[RunHistory]) -> bool:
    """Whether the x axis is the number of samples, as some run has no steps."""
    return any(series.steps is None for run in runs for series in run.series.values())


def panels_of(runs: Sequence[RunHistory], smooth: int | None, log: bool | None) -> list[Panel]:
    """Loss, throughput and waiting, as far as some run has them.

    Args:
        smooth: values in a mean; None: a 30th of them.
        log: whether the axis of the loss is logarithmic; None: if it covers more than a range of 10.
    """
    per_s = "tokens_per_s" if all(_has(run, "tokens_per_s") for run in runs if _has(run, "samples_per_s")) else ""
    rate = per_s or "samples_per_s"
    panels = [
        _panel("loss", _losses(runs, smooth), log),
        _panel(rate.replace("_per_s", " per second"), _lines(runs, rate, smooth), False),
        _panel("time waited, %", _lines(runs, "waited_share", smooth, 100.0), False),
    ]
    return [panel for panel in panels if panel.curves]


def smoothed(values: Sequence[float], window: int, *, falls: bool = False) -> list[float]:
    """The mean of each value and its neighbours, `window` values in all, and fewer at both ends.

    Args:
        falls: the first values fall steeply: so the window begins there with one value, and grows on both sides alike.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for i in range(len(values)):
        before = min(window // 2, i)
        after = min(before if falls else window // 2, len(values) - 1 - i)
        result.append((sums[i + after + 1] - sums[i - before]) / (before + after + 1))
    return result


def _has(run: RunHistory, name: str) -> bool:
    return name in run.series


def _losses(runs: Sequence[RunHistory], smooth: int | None) -> list[Curve]:
    curves = []
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        others = sorted(name for name in run.series if _is_other_loss(name))
        if _has(run, "loss"):
            series = run.series["loss"]
            name = "loss (train)" if alone else f"{run.name}, train" if others else run.name
            curves.append(_curve(name, number, runs, series, smooth))
        for other in others:
            x, y = _places(runs, run.series[other]), run.series[other].values
            curves.append(Curve(other if alone else f"{run.name}, {other}", number, x, y, None))
    return curves


def _is_other_loss(name: str) -> bool:
    return "loss" in name and name not in ("loss", "loss_scale")


def _lines(runs: Sequence[RunHistory], name: str, smooth: int | None, factor: float = 1.0) -> list[Curve]:
    return [
        _curve("", number, runs, run.series[name], smooth, factor) for number, run in enumerate(runs) if _has(run, name)
    ]


def _curve(
    name: str, number: int, runs: Sequence[RunHistory], series: Series, smooth: int | None, factor: float = 1.0
) -> Curve:
    y = [factor * value for value in series.values]
    window = max(1, len(y) // _SMOOTH_SHARE) if smooth is None else smooth
    return Curve(name, number, _places(runs, series), y, smoothed(y, window, falls=bool(name)))


def _places(runs: Sequence[RunHistory], series: Series) -> list[int]:
    return series.samples if by_samples(runs) or series.steps is None else series.steps


def _panel(label: str, curves: list[Curve], log: bool | None) -> Panel:
    raw = sorted(value for curve in curves for value in curve.y)
    lines = [value for curve in curves for value in curve.smooth or curve.y]
    if not raw:
        return Panel(label, [], False, 0.0, 1.0)
    least = min(lines)
    is_log = least > 0 and (max(lines) / least > _LOG_FROM if log is None else log)
    cut = int(len(raw) * _OUTLIERS)
    high = max(raw[-1 - cut], *lines)
    low = min(raw[cut], *lines) if label == "loss" else 0.0
    if is_log:
        return Panel(label, curves, True, max(low, least / 10) / 1.1, high * 1.1)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Panel(label, curves, False, low - (room if label == "loss" else 0.0), high + room)
