"""One name of DeepSpeed's documented surface, and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

PACKAGE = "partita.compat.deepspeed"


class Answer(Enum):
    """What a program gets that asks for a name."""

    WORKS = "works"  # does what DeepSpeed's documentation says
    DIFFERS = "differs"  # is there, and does something else in some point
    ABSENT = "absent"  # raises an error that says what to do


@dataclass(frozen=True)
class Row:
    """A name and its answer.

    Attributes:
        name: dotted, beginning with "deepspeed.". An attribute of an engine is one of the class.
        how: WORKS: what stands behind the name. DIFFERS: the difference. ABSENT: what to do.
    """

    name: str
    answer: Answer
    how: str

    @property
    def real_name(self) -> str:
        """The name in this package."""
        return PACKAGE + self.name.removeprefix("deepspeed")


def rows(answer: Answer, prefix: str, names: Mapping[str, str]) -> Iterator[Row]:
    """Rows of one answer: below `prefix`, each name (or several with a blank between them) with what is said of it."""
    for several, how in names.items():
        for name in several.split():
            yield Row(f"deepspeed.{prefix}{name}", answer, how)


def works(prefix: str, names: Mapping[str, str]) -> list[Row]:
    """Names that do what they do in DeepSpeed."""
    return list(rows(Answer.WORKS, prefix, names))


def differs(prefix: str, names: Mapping[str, str]) -> list[Row]:
    """Names that do something else in a point that is said."""
    return list(rows(Answer.DIFFERS, prefix, names))


def absent(prefix: str, names: Mapping[str, str]) -> list[Row]:
    """Names that are not here, with what to do."""
    return list(rows(Answer.ABSENT, prefix, names))
