"""A dict checked against the models, with one error that lists everything that is wrong."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from partita.config.allowed import allowed_values
from partita.config.errors import ConfigError
from partita.config.fields import Section
from partita.config.models import Config
from partita.config.sections import join, subsections
from partita.config.unknown_keys import explain_unknown_key

_AUTO = "auto"
_AUTO_EXPLAINED = '"auto" is filled in by Hugging Face\'s Trainer, not by Partita; give a number, or remove the key'
_LONGEST_VALUE = 80


def validated(raw: dict[str, Any], origin: str) -> Config:
    """The config that `raw` describes; `origin` is what an error message calls the dict.

    Raises:
        ConfigError: lists every wrong key with its value and what is allowed instead.
    """
    try:
        config = Config.model_validate(raw)
        problems = []
    except ValidationError as error:
        problems = [_line(detail) for detail in error.errors() if detail["input"] != _AUTO or _is_unknown(detail)]
    problems += [f"{key}: {_AUTO_EXPLAINED}" for key in _auto_values(raw, Config)]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{count} in {origin}:", *problems])) from None
    return config


def _line(detail: ErrorDetails) -> str:
    """'section.key: what is wrong' for one of pydantic's findings."""
    path, section, rest = _locate(detail["loc"])
    if not rest and detail["type"] == "value_error":  # a rule between several keys of this section
        return f"{path}: {_complaint(detail)}" if path else _complaint(detail)
    if not rest:
        return f"{path} = {_shown(detail['input'])}: expected an object"
    key = rest[0]
    dotted = join(path, key)
    if _is_unknown(detail):
        return f"{dotted}: {explain_unknown_key(path, key, section)}"
    if detail["type"] == "missing":
        return f"{dotted}: missing; expected {allowed_values(section)[str(key)]}"
    if detail["type"] == "value_error":
        return f"{dotted} = {_shown(detail['input'])}: {_complaint(detail)}"
    if key in section.model_fields:
        return f"{dotted} = {_shown(detail['input'])}: expected {allowed_values(section)[str(key)]}"
    return f"{dotted}: {detail['msg']}"


def _locate(location: tuple[int | str, ...]) -> tuple[str, type[Section], tuple[int | str, ...]]:
    """The deepest section that a location leads into, and the rest of the location from there."""
    path = ""
    section: type[Section] = Config
    for depth, key in enumerate(location):
        below = subsections(section).get(str(key))
        if below is None:
            return path, section, location[depth:]
        path, section = join(path, key), below
    return path, section, ()


def _is_unknown(detail: ErrorDetails) -> bool:
    return detail["type"] == "extra_forbidden"


def _complaint(detail: ErrorDetails) -> str:
    """The sentence that a validator of ours raised."""
    return str(detail["ctx"]["error"])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def _auto_values(value: Any, section: type[Section] | None, path: str = "") -> Iterator[str]:
    """Dotted keys that hold "auto". Keys that are unknown anyway are left to their own message."""
    if value == _AUTO:
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if section is None:  # free-form params
                yield from _auto_values(item, None, join(path, key))
            elif key in section.model_fields and not _takes_auto(section, key):
                yield from _auto_values(item, subsections(section).get(key), join(path, key))


def _takes_auto(section: type[Section], key: str) -> bool:
    return _AUTO in typing.get_args(section.model_fields[key].annotation)
