"""The command `partita plot`: curves of runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.files import file_to_write
from partita.monitor import Panel, RunHistory, by_samples, panels_of, read_run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # told apart by everybody
_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # when the colours are used up
_MARKERS = ("o", "s", "^", "D")
_KINDS = (".png", ".svg", ".pdf")
_LOSS_INCHES, _OTHER_INCHES, _WIDTH_INCHES = 3.4, 1.7, 9.0
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders: monitor.dir of a run, or that of its csv_monitor.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.")] = Path("plot.png"),
    smooth: Annotated[
        int | None,
        typer.Option(min=1, help="Values in the mean of a smooth line; 1: none; without it: a 30th of the run."),
    ] = None,
    log: Annotated[
        bool | None, typer.Option("--log/--linear", help="The axis of the loss; without it: as its range asks for.")
    ] = None,
) -> None:
    """Draw loss, throughput and waiting of one or several runs."""
    try:
        histories = _named_apart([read_run(path) for path in runs], runs)
        _draw(histories, output, smooth, log)
    except (ValueError, OSError) as error:
        of_file = isinstance(error, OSError) and error.strerror and f"{error.filename}: {error.strerror}"
        typer.echo(of_file or str(error), err=True)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        typer.echo(
            f"partita plot needs {(error.name or '').partition('.')[0]}: pip install 'partita[monitor]'", err=True
        )
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {', '.join(history.name for history in histories)}")


def _named_apart(histories: Sequence[RunHistory], paths: Sequence[Path]) -> list[RunHistory]:
    """Runs whose folders have the same name are called by their paths."""
    names = [history.name for history in histories]
    return [
        RunHistory(str(path) if names.count(history.name) > 1 else history.name, history.series)
        for history, path in zip(histories, paths, strict=True)
    ]


def _draw(histories: Sequence[RunHistory], output: Path, smooth: int | None, log: bool | None) -> None:
    """Writes one picture with a panel for each kind of value that some run has."""
    if output.suffix not in _KINDS:
        raise ValueError(f"'{output}': the name of a picture ends in {', '.join(_KINDS)}")
    place = file_to_write(output)
    panels = panels_of(histories, smooth, log)
    if not panels:
        known = sorted({name for history in histories for name in history.series})
        raise ValueError(f"no run has a loss, a throughput or a share of waiting, only {', '.join(known)}")
    from matplotlib.figure import Figure

    heights = [_LOSS_INCHES if panel.label == "loss" else _OTHER_INCHES for panel in panels]
    figure = Figure(figsize=(_WIDTH_INCHES, 0.4 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, each in zip(panels, axes, strict=True):
        _fill(each, panel)
    figure.align_ylabels(axes)
    axes[-1].set_xlabel("samples" if by_samples(histories) else "step")
    axes[-1].xaxis.set_major_formatter(lambda value, _: _short(value))
    figure.savefig(place, dpi=150)


def _fill(axes: Any, panel: Panel) -> None:
    """Faint values, and on them smooth lines. axes: matplotlib's."""
    from matplotlib.ticker import LogLocator

    for curve in panel.curves:
        turn, colour = divmod(curve.run, len(_COLOURS))
        look: dict[str, Any] = {"color": _COLOURS[colour], "linestyle": _STYLES[turn % len(_STYLES)]}
        if curve.smooth is None:
            before = [other for other in panel.curves if other.run == curve.run and other.smooth is None]
            marker = _MARKERS[before.index(curve) % len(_MARKERS)]
            look |= {"linestyle": "--", "marker": marker, "markersize": 5, "markerfacecolor": "white"}
            axes.plot(curve.x, curve.y, label=curve.name, linewidth=1.2, **look)
            continue
        if curve.smooth != curve.y:
            axes.plot(curve.x, curve.y, color=_COLOURS[colour], alpha=0.25, linewidth=0.8)
        axes.plot(curve.x, curve.smooth, label=curve.name or None, linewidth=1.6, **look)
    axes.set_ylabel(panel.label)
    axes.set_yscale("log" if panel.is_log else "linear")
    axes.set_ylim(panel.low, panel.high)
    if panel.is_log:
        subs = (1, 2, 5) if panel.high > 30 * panel.low else (1, 1.5, 2, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(curve.name for curve in panel.curves):
        axes.legend(frameon=False, fontsize=9, ncols=1 + len(panel.curves) // 7)


def _short(value: float) -> str:
    """12k for 12,000."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:g}{prefix}"
    return f"{value:.6g}"
