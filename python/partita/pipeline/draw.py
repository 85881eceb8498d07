"""Pictures of a simulated step: when each rank does what."""

from __future__ import annotations

from pathlib import Path

from partita.files import file_to_write
from partita.pipeline.simulate import Simulation, Span

COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#54a24b"}
SUFFIXES = (".svg", ".png", ".pdf")


def timeline(run: Simulation, width: int = 120) -> str:
    """A line for each rank: the letter of the action under way at each moment, '.' where a rank is idle.

    A second stage of a rank has small letters, of a third on also.
    """
    if not run.compute_time:
        return ""
    label = len(str(len(run.spans) - 1))
    columns = max(1, min(width - label - 1, round(run.compute_time / _shortest(run))))
    lines = []
    for rank, spans in enumerate(run.spans):
        first = min((span.action.stage for span in spans), default=0)
        cells = ["."] * columns
        for span in spans:
            begin, end = (round(time / run.compute_time * columns) for time in (span.start, span.end))
            letter = span.action.kind if span.action.stage == first else span.action.kind.lower()
            cells[begin:end] = [letter] * (end - begin)
        lines.append(f"{rank:>{label}} {''.join(cells)}")
    return "\n".join(lines)


def draw(run: Simulation, path: Path, title: str = "") -> None:
    """A Gantt chart as an image; a file's suffix says which.

    Raises:
        ValueError: another suffix.
        OSError: something else than a file is there.
        ImportError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"'{path}': a picture's name ends with one of {', '.join(SUFFIXES)}")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = len(run.spans)
    figure = Figure(figsize=(16, 1.2 + 0.45 * ranks), layout="constrained")
    axes = figure.subplots()
    shows_numbers = sum(len(spans) for spans in run.spans) <= 2000
    for rank, spans in enumerate(run.spans):
        chunk_of = {stage: chunk for chunk, stage in enumerate(sorted({span.action.stage for span in spans}))}
        for span in spans:
            kind, stage, m = span.action
            lighter = 1 / (1 + 0.6 * chunk_of[stage])
            box = [(span.start, span.end - span.start)]
            axes.broken_barh(
                box, (rank - 0.45, 0.9), facecolors=COLOURS[kind], alpha=lighter, edgecolor="white", lw=0.3
            )
            if shows_numbers:
                axes.text((span.start + span.end) / 2, rank, str(m), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, run.compute_time)
    axes.set_xlabel("time")
    axes.set_title(title or f"{run.bubble:.1%} idle")
    kinds = sorted({span.action.kind for spans in run.spans for span in spans})
    figure.legend(handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds], loc="outside right upper")
    figure.savefig(file_to_write(path), dpi=150, format=path.suffix[1:])


def _shortest(run: Simulation) -> float:
    times = [_length(span) for spans in run.spans for span in spans if _length(span) > 0]
    return min(times, default=run.compute_time)


def _length(span: Span) -> float:
    return span.end - span.start
