"""The three answers to a key of a config: it works, it is noted, it is refused.

Every key that DeepSpeed 0.19 reads has an answer. A key of `models` works. Other keys stand in a table of rules:
`deepspeed_keys` and `deepspeed_zero_keys`. So do values of a key of `models` that mean something else here. The loading
of a config, the table of `partita config check` and the lists in docs/config.md are made from these tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Answer(Enum):
    """What becomes of a key and its value."""

    WORKS = "works"  # the value has the effect that its name says
    NOTED = "noted"  # accepted without an effect of its own, and listed in `Config.ignored`
    REFUSED = "refused"  # the config does not load


@dataclass(frozen=True)
class Values:
    """A set of values of a key.

    Attributes:
        words: the set for people.
        hold: whether a value is in the set.
        examples: some values of the set.
    """

    words: str
    hold: Callable[[Any], bool]
    examples: tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """The answer to a key that has one of some values.

    Attributes:
        reason: NOTED: why the value has no effect of its own. REFUSED: what to do. WORKS: what the value stands for.
        becomes: dotted key that gets the value; empty: no key does.
        convert: from the value to that of `becomes`.
    """

    values: Values
    answer: Answer
    reason: str
    becomes: str = ""
    convert: Callable[[Any], Any] = lambda value: value


Rule = tuple[Case, ...]
"""The cases of one key; the first one that holds a value counts."""


@dataclass(frozen=True)
class Ignored:
    """A key that was accepted and has no effect of its own, or an "auto" and what it became.

    Attributes:
        key: dotted.
        value: as the config had it.
        reason: why, or what takes its place.
        warns: the program probably expects more than it gets.
    """

    key: str
    value: Any
    reason: str
    warns: bool = False

    def __str__(self) -> str:
        return f"{self.key} = {shown(self.value)}: {self.reason}"


@dataclass(frozen=True)
class Finding:
    """The answer to one key of one config."""

    key: str
    value: Any
    answer: Answer
    reason: str
    warns: bool = False
    has_value: bool = True  # False: a key that is missing, or a rule between several keys of a section

    def __str__(self) -> str:
        if not self.key:
            return self.reason
        return f"{self.key} = {shown(self.value)}: {self.reason}" if self.has_value else f"{self.key}: {self.reason}"


_LONGEST_VALUE = 80


def shown(value: Any) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _same(value: Any, other: Any) -> bool:
    """1 is not true."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def only(*values: Any) -> Values:
    """These values."""
    words = ", ".join(f"`{json.dumps(value)}`" for value in values)
    return Values(words, lambda value: any(_same(value, each) for each in values), values)


def numbers(words: str, hold: Callable[[float], bool], *examples: float) -> Values:
    """Numbers for which `hold` is true; true and false are none."""
    return Values(
        words,
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and hold(value),
        examples,
    )


ANY = Values("any", lambda value: True, (True, {}))
AS_THERE = Values("as there", lambda value: True, (1, 20))
OTHER = Values("any other", lambda value: True, ({"enabled": True}, "other"))

OFF = Values(
    "off: `false`, `null`, `{}`, or an object whose `enabled` is not true",
    lambda value: not value or (isinstance(value, Mapping) and not value.get("enabled")),
    (False, None, {}, {"enabled": False}),
)
"""A section of DeepSpeed's that has to be enabled."""

EMPTY = Values(
    "nothing: `false`, `null`, `{}`, or `enabled: false`",
    lambda value: not value or (isinstance(value, Mapping) and value.get("enabled") is False),
    (False, None, {}, {"enabled": False}),
)
"""A section of DeepSpeed's that is enabled by being there."""


def noted(reason: str, values: Values = ANY, becomes: str = "", convert: Callable[[Any], Any] | None = None) -> Case:
    """Accepted and listed."""
    return Case(values, Answer.NOTED, reason, becomes, *([convert] if convert else []))


def refused(remedy: str, values: Values = OTHER) -> Case:
    """An error that says what to do."""
    return Case(values, Answer.REFUSED, remedy)


def written_as(key: str, values: Values = AS_THERE, value: Any = None) -> Case:
    """Another way to write `key`: with the same value, or with `value`."""
    target = f"`{key}`" if value is None else f"`{key}: {json.dumps(value)}`"
    return Case(values, Answer.WORKS, f"another way to write {target}", key, (lambda _: value) if value else _itself)


def _itself(value: Any) -> Any:
    return value
