"""A dict checked against the rules and the models, with one error that lists everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from partita.config.allowed import allowed_values
from partita.config.answers import Answer, Finding, Ignored
from partita.config.errors import ConfigError
from partita.config.fields import Section
from partita.config.models import Config
from partita.config.sections import join, subsections
from partita.config.sort_out import AUTO, OPEN, SortedConfig, leaves, sort_out
from partita.config.sort_params import FACTORIES
from partita.config.unknown_keys import explain_unknown_key


def validated(raw: Mapping[Any, Any], origin: str) -> Config:
    """The config that `raw` describes; `origin` is what an error message calls the dict.

    Raises:
        ConfigError: lists every wrong key with its value and what is allowed instead.
    """
    sorted_config, config = _valid(raw, origin)
    notes = (f for f in sorted_config.findings if f.answer is Answer.NOTED)
    ignored = (Ignored(f.key, f.value, f.reason, f.warns) for f in notes)
    return config.with_notes(ignored, sorted_config.open)


def clean(raw: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """The clean form of a config that `validated` accepts. What waits for a model or for data is still "auto"."""
    sorted_config, config = _valid(raw, origin)
    _take_values(sorted_config.clean, config.model_dump(mode="json"))
    for key in OPEN.keys() & sorted_config.open:
        *path, name = key.split(".")
        home = sorted_config.clean
        for section in path:
            home = home[section]
        home[name] = AUTO
    return sorted_config.clean


def _take_values(clean: dict[str, Any], values: dict[str, Any]) -> None:
    """Gives every key the value that the models made of it: 5e8 is an integer then."""
    for key, value in clean.items():
        if isinstance(value, dict):
            _take_values(value, values[key])
        else:
            clean[key] = values[key]


def answers_in(raw: Mapping[Any, Any]) -> list[Finding]:
    """The answer to every key of a config, in the order of the keys as far as possible."""
    sorted_config = sort_out(raw)
    _, wrong = _checked(sorted_config.clean)
    found = sorted_config.findings + wrong
    named = {finding.key for finding in found}
    written = dict(leaves(raw))
    unknown = tuple(f"{finding.key}." for finding in wrong if _field(finding.key) is None)
    works = [
        Finding(key, written[key], Answer.WORKS, _described(key))
        for key, _ in leaves(sorted_config.clean)
        if key not in named and key in written and not key.startswith(unknown)
    ]
    order = {key: place for place, key in enumerate(written)}
    return sorted(found + works, key=lambda finding: order.get(finding.key, len(order)))


def _valid(raw: Mapping[Any, Any], origin: str) -> tuple[SortedConfig, Config]:
    sorted_config = sort_out(raw)
    config, wrong = _checked(sorted_config.clean)
    refused = [finding for finding in sorted_config.findings if finding.answer is Answer.REFUSED] + wrong
    if config is None or refused:
        count = "1 problem" if len(refused) == 1 else f"{len(refused)} problems"
        raise ConfigError("\n  ".join([f"{count} in {origin}:", *map(str, refused)]))
    return sorted_config, config


def _checked(clean: dict[str, Any]) -> tuple[Config | None, list[Finding]]:
    try:
        return Config.model_validate(clean), []
    except ValidationError as error:
        return None, [_finding(detail) for detail in error.errors()]


def _described(dotted: str) -> str:
    """What a key of the models means, or a parameter of what an optimizer or a schedule can be."""
    start, _, name = dotted.rpartition(".")
    if start in ("optimizer.params", "scheduler.params"):
        factories = FACTORIES[start.partition(".")[0]].values()
        return next((factory.parameters[name].meaning for factory in factories if name in factory.parameters), "")
    field = _field(dotted)
    return (field.description or "") if field else ""


def _field(dotted: str) -> FieldInfo | None:
    section: type[Section] = Config
    *path, key = dotted.split(".")
    for name in path:
        section = subsections(section).get(name, section)
    return section.model_fields.get(key)


def _finding(detail: ErrorDetails) -> Finding:
    """The refusal of what pydantic found."""
    path, section, rest = _locate(detail["loc"])
    value = detail["input"]
    if not rest and detail["type"] == "value_error":  # a rule between several keys of this section
        return _refused(path, value, _complaint(detail), has_value=False)
    if not rest:
        return _refused(path, value, f"expected an object{_meant_object(path, section, value)}")
    key = rest[0]
    dotted = join(path, key)
    if detail["type"] == "extra_forbidden":
        return _refused(dotted, value, explain_unknown_key(path, key, section), has_value=False)
    if detail["type"] == "missing":
        return _refused(dotted, value, f"missing; expected {allowed_values(section)[str(key)]}", has_value=False)
    if detail["type"] == "value_error":
        return _refused(dotted, value, _complaint(detail))
    if key in section.model_fields:
        return _refused(dotted, value, f"expected {allowed_values(section)[str(key)]}")
    return _refused(dotted, value, detail["msg"], has_value=False)


def _refused(key: str, value: Any, reason: str, *, has_value: bool = True) -> Finding:
    return Finding(key, value, Answer.REFUSED, reason, has_value=has_value)


def _meant_object(path: str, section: type[Section], value: Any) -> str:
    """The object that a value in place of a section probably stands for."""
    key = next(
        (k for k in ("enabled", "stage", "type", "device", "transport", "schedule") if k in section.model_fields), None
    )
    if key == "stage" and isinstance(value, bool):
        value = int(value)  # what DeepSpeed made of it
    kinds = {"enabled": (bool,), "stage": (int,)}.get(str(key), (str,))
    if key is None or not (isinstance(value, kinds) or value == "auto"):
        return ""
    meant = {key: value, "params": {}} if key == "type" else {key: value}
    return f'; write "{path.rpartition(".")[2]}": {json.dumps(meant)}'


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


def _complaint(detail: ErrorDetails) -> str:
    """The sentence that a validator of ours raised."""
    return str(detail["ctx"]["error"])
