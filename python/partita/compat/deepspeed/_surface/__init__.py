"""DeepSpeed's documented surface as data: each name, and what a program gets that asks for it.

From these rows come docs/deepspeed.md, the errors of absent names, and a test of every row. Config keys have their
answers in `partita.config`.
"""

from functools import cache

from partita.compat.deepspeed._surface import (
    building,
    engine,
    engine_config,
    other_engines,
    pipeline,
    tools,
    zero,
)
from partita.compat.deepspeed._surface.engine_config import QUESTIONS
from partita.compat.deepspeed._surface.row import PACKAGE, Answer, Row

__all__ = ["PACKAGE", "QUESTIONS", "SECTIONS", "Answer", "Row", "advice", "all_rows"]

SECTIONS: dict[str, list[Row]] = {
    "Setting up": building.SETUP,
    "The engine": engine.ROWS,
    "The engine's questions about its config": engine_config.ROWS,
    "ZeRO": zero.ROWS,
    "Pipelines": pipeline.ROWS,
    "Optimizers and schedules": building.OPTIMIZERS,
    "Activation checkpointing": tools.RECOMPUTATION,
    "Checkpoint files": tools.CHECKPOINTS,
    "Communication and devices": tools.COMMUNICATION,
    "Tools": tools.UTILITIES,
    "Monitoring and profiling": tools.WATCHING,
    "Parts of DeepSpeed that Partita has not": other_engines.ROWS,
}
"""The rows by the heading that they have in docs/deepspeed.md."""


def all_rows() -> list[Row]:
    """Every row."""
    return [row for rows in SECTIONS.values() for row in rows]


@cache
def _by_name() -> dict[str, Row]:
    return {row.name: row for row in all_rows()}


_DOCUMENTED_AS = {
    "deepspeed.runtime.activation_checkpointing.checkpointing": "deepspeed.checkpointing",
    "deepspeed.runtime.pipe": "deepspeed.pipe",
    "deepspeed.runtime.zero": "deepspeed.zero",
}
"""Where a module is -> the name that DeepSpeed's pages call it by."""


def advice(name: str) -> str:
    """What to do without a name: its own row, that of the absent thing that it is in, or those of what is in it; empty:
    nothing is known of it."""
    names = [name, *(name.replace(real, shown, 1) for real, shown in _DOCUMENTED_AS.items() if name.startswith(real))]
    return next((said for said in map(_advice, names) if said), "")


def _advice(name: str) -> str:
    row, inside = _by_name().get(name), name
    while row is None and inside:
        inside = inside.rpartition(".")[0]
        row = _by_name().get(inside)
    if row is not None and (inside == name or row.answer is Answer.ABSENT):
        return row.how
    parts = [row for row in all_rows() if row.name.startswith(f"{name}.")]
    return (
        "" if any(row.answer is not Answer.ABSENT for row in parts) else "; ".join(dict.fromkeys(r.how for r in parts))
    )
