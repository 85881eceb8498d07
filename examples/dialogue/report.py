"""What a run of finetune_chat.py measures after each phase; its table, its picture and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.report import BLUE, GREY, ORANGE
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

GREEN = "#2e8b57"


@dataclass(frozen=True)
class Phase:
    """The model after a phase; None where a phase has no such number.

    Attributes:
        name: "before", "fine-tuning" or "round N".
        perplexity: of the assistant's held-out tokens.
        score: mean over answers that are drawn for held-out histories, by --score: what the rounds are to raise.
        token_f1: of greedy answers to held-out histories against their references, the mean.
        loss_data, loss_generated: mean over the phase's tokens, in nats.
        histories, kept: to how many histories of the training data answers were drawn then, and of how many the best
            one is kept for the next round.
        score_drawn, score_greedy, score_kept: mean scores of all these answers, of the greedy ones to the same
            histories, and of those that are kept.
    """

    name: str
    steps: int
    perplexity: float
    score: float
    token_f1: float
    seconds: float
    loss_data: float | None = None
    loss_generated: float | None = None
    histories: int | None = None
    kept: int | None = None
    score_kept: float | None = None
    score_drawn: float | None = None
    score_greedy: float | None = None


COLUMNS = (  # heading, attribute, format, which way is better
    ("held-out: perplexity", "perplexity", ".2f", -1),
    ("score", "score", ".4f", 1),
    ("greedy F1", "token_f1", ".4f", 1),
    ("training histories: score", "score_drawn", ".4f", 1),
    ("of greedy", "score_greedy", ".4f", 1),
    ("of kept", "score_kept", ".4f", 1),
    ("kept", "kept", ",d", 0),
    ("loss: data", "loss_data", ".3f", 0),
    ("kept", "loss_generated", ".3f", 0),
)


def line_of(phase: Phase, last: Phase | None) -> str:
    """A phase's numbers, each beside the last phase's that has it."""
    parts = []
    for heading, name, form, better in COLUMNS:
        value, before = getattr(phase, name), getattr(last, name) if last else None
        if value is None:
            continue
        text = f"{heading} {value:{form}}"
        if before is not None:
            mark = "" if not better or value == before else " better" if (value - before) * better > 0 else " worse"
            text += f" (before {before:{form}}{mark})"
        parts.append(text)
    return f"{phase.name}: " + ", ".join(parts) + f"; step {phase.steps}, {phase.seconds:.0f} s"


def table(phases: Sequence[Phase]) -> str:
    """All phases in columns of text."""
    rows = [["phase", "steps", *(heading for heading, *_ in COLUMNS)]]
    for phase in phases:
        cells = [getattr(phase, name) for _, name, _, _ in COLUMNS]
        formats = [form for _, _, form, _ in COLUMNS]
        texts = ["-" if value is None else f"{value:{form}}" for value, form in zip(cells, formats, strict=True)]
        rows.append([phase.name, str(phase.steps), *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def write_phases(phases: Sequence[Phase], settings: dict[str, object], file: Path) -> None:
    text = json.dumps({"settings": settings, "phases": [asdict(phase) for phase in phases]}, indent=2, default=str)
    file.write_text(text + "\n", encoding="utf-8")


def plot_phases(phases: Sequence[Phase], title: str, file: Path) -> None:
    """Perplexity, token F1 and scores over the phases."""
    names = [phase.name for phase in phases]
    figure = Figure(figsize=(11, 3.8), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    perplexity, held_out, score = figure.subplots(1, 3)
    perplexity.plot(names, [phase.perplexity for phase in phases], color=BLUE, marker="o")
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    perplexity.yaxis.set_minor_formatter(NullFormatter())
    perplexity.set_title("held-out perplexity (log scale)", fontsize=10, loc="left")
    held_out.plot(names, [phase.score for phase in phases], color=BLUE, marker="o", label="score of drawn answers")
    held_out.plot(
        names, [phase.token_f1 for phase in phases], color=ORANGE, marker="o", label="token F1 of greedy ones"
    )
    held_out.set_title("answers to held-out histories", fontsize=10, loc="left")
    held_out.legend(frameon=False, fontsize=9)
    rounds = [phase for phase in phases if phase.score_drawn is not None]
    for label, name, colour in (
        ("kept", "score_kept", GREEN),
        ("greedy", "score_greedy", ORANGE),
        ("drawn", "score_drawn", BLUE),
    ):
        values = [(phase.name, getattr(phase, name)) for phase in rounds if getattr(phase, name) is not None]
        score.plot([name for name, _ in values], [value for _, value in values], color=colour, marker="o", label=label)
    score.set_title("answers to training histories", fontsize=10, loc="left")
    if rounds:
        score.legend(frameon=False, fontsize=9)
    for axes in (perplexity, held_out, score):
        axes.grid(color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelsize=8, axis="both")
        axes.tick_params(axis="x", rotation=25)
        axes.margins(x=0.08, y=0.12)
    for phase in phases:
        drawn = [] if phase.score_drawn is None else [(score, phase.score_drawn, ".3f")]
        for axes, value, form in ((perplexity, phase.perplexity, ",.0f"), (held_out, phase.score, ".3f"), *drawn):
            axes.annotate(f"{value:{form}}", (phase.name, value), (0, 7), textcoords="offset points", fontsize=8)
    figure.savefig(file)
