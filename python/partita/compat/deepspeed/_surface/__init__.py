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


def advice(name: str) -> str:
    """What to do without a name, or without the absent thing that it is in; empty: nothing is known of it."""
    row, inside = _by_name().get(name), name
    while row is None and inside:
        inside = inside.rpartition(".")[0]
        row = _by_name().get(inside)
    return "" if row is None or (inside != name and row.answer is not Answer.ABSENT) else row.how
