"""The params of an optimizer or a schedule, checked when the config is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from partita.config.answers import Answer, Finding
from partita.config.nearest import suggest
from partita.config.parameters import (
    ADAM_MODES,
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REQUIRED,
    SCHEDULES,
    Factory,
)

FACTORIES: dict[str, dict[str, Factory]] = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULES}
"""Section -> what it can name here. Other names are classes of torch, which this room does not know."""


@dataclass
class Sorted:
    """The clean form of a `type` and its `params`.

    Attributes:
        open: parameters whose "auto" is decided when there are a model and an optimizer.
    """

    type_name: str
    params: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    open: set[str] = field(default_factory=set)


def sort_params(section: str, type_name: str, params: Mapping[Any, Any]) -> Sorted:
    """Sorts `params` of the optimizer or the schedule `type_name`."""
    if section == "optimizer" and (remedy := REFUSED_OPTIMIZERS.get(type_name.lower())) is not None:
        finding = Finding("optimizer.type", type_name, Answer.REFUSED, remedy)
        return Sorted(type_name, findings=[finding])
    known = FACTORIES[section]
    if type_name == "auto":
        remedy = f"write a name: {', '.join(known)}"
        return Sorted(type_name, findings=[Finding(f"{section}.type", type_name, Answer.REFUSED, remedy)])
    by_name = {name.lower(): name for name in known} if section == "optimizer" else {name: name for name in known}
    name = by_name.get(type_name.lower() if section == "optimizer" else type_name)
    result = Sorted(type_name)
    for key, value in params.items():
        _sort(result, section, known[name] if name else None, key, value)
    if name is not None:
        _require_all(result, section, name, known[name])
    if section == "optimizer" and name == "Adam" and (said := _adam_decay(result.params)) is not None:
        result.findings.append(said)
    if section == "scheduler" and name == "WarmupDecayLR" and "total_num_steps" in result.open:
        _without_an_end(result)
    return result


def _sort(result: Sorted, section: str, factory: Factory | None, key: Any, value: Any) -> None:
    dotted = f"{section}.params.{key}"
    if value == "auto":
        result.open.add(key)
        result.findings.append(Finding(dotted, value, Answer.NOTED, _auto_reason(factory, key)))
        if key == "warmup_max_lr":
            result.params[key] = None  # the optimizer's
        return
    if factory is None or not isinstance(key, str):
        result.params[key] = value
        return
    case = next((case for case in factory.rules.get(key, ()) if case.values.hold(value)), None)
    if case is not None:
        result.findings.append(Finding(dotted, value, case.answer, case.reason))
    elif key not in factory.parameters:
        reason = f"{result.type_name} has no parameter {key!r}{suggest(key, factory.parameters)}"
        result.findings.append(Finding(dotted, value, Answer.REFUSED, reason, has_value=False))
    elif not factory.parameters[key].kind.holds(value):
        reason = f"expected {factory.parameters[key].kind.words}"
        result.findings.append(Finding(dotted, value, Answer.REFUSED, reason))
    else:
        result.params[key] = value


def _auto_reason(factory: Factory | None, key: Any) -> str:
    if key == "warmup_max_lr":
        return "is the learning rate of the optimizer"
    if factory is None or key not in factory.parameters:
        return "is left to the default"
    return f"is {factory.parameters[key].default!r}, the default"


def _require_all(result: Sorted, section: str, name: str, factory: Factory) -> None:
    for key, parameter in factory.parameters.items():
        if parameter.default is not REQUIRED or key in result.params:
            continue
        dotted = f"{section}.params.{key}"
        if any(finding.key == dotted and finding.answer is Answer.REFUSED for finding in result.findings):
            continue
        if key in result.open and name == "WarmupDecayLR":
            continue
        result.findings = [finding for finding in result.findings if finding.key != dotted]
        reason = f"{name} needs it: {parameter.meaning} ({parameter.kind.words})"
        result.findings.append(Finding(dotted, "auto", Answer.REFUSED, reason, has_value=key in result.open))


def _adam_decay(params: Mapping[str, Any]) -> Finding | None:
    decay = params.get("weight_decay", 0)
    if decay == 0 or params.get("adam_w_mode") is not None:
        return None
    return Finding("optimizer.params.weight_decay", decay, Answer.REFUSED, ADAM_MODES)


def _without_an_end(result: Sorted) -> None:
    """A decay whose end nobody says does not begin: the schedule is its warm-up."""
    key = "scheduler.params.total_num_steps"
    reason = (
        "nobody says how many optimizer steps there are, so the learning rate stays where the warm-up ends; "
        "write the number for the decay"
    )
    result.type_name = "WarmupLR"
    result.findings = [finding for finding in result.findings if finding.key != key]
    result.findings.append(Finding(key, "auto", Answer.NOTED, reason, warns=True))
