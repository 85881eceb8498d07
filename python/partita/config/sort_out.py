"""The keys of a config, sorted by their answers: what is left is the clean form, which the models check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from partita.config.answers import Answer, Case, Finding, Rule
from partita.config.deepspeed_keys import COMMENT, RULES, is_comment
from partita.config.fields import Section, takes_auto
from partita.config.models import Config
from partita.config.sections import join, may_be_null, subsections
from partita.config.sort_params import FACTORIES, Sorted, sort_params
from partita.config.unknown_keys import explain_unknown_key

AUTO = "auto"

OPEN: dict[str, str] = {
    "fp16.enabled": "follows the parameters of the model",
    "bf16.enabled": "follows the parameters of the model",
    "train_batch_size": "follows from the micro-batch, the accumulation and the ranks",
    "train_micro_batch_size_per_gpu": "is open: it follows from the other sizes, or is 1",
    "gradient_accumulation_steps": "follows from the other sizes, or is 1",
}
"""Keys whose "auto" is decided when there are a model and an optimizer -> what is said until then."""

_BY_DEVICE = "is null, the default: the size follows the kind of device and the number of ranks"
_SAID = {
    "gradient_clipping": "is 0.0, the default: gradients are not clipped",
    "zero_optimization.reduce_bucket_size": _BY_DEVICE,
    "zero_optimization.allgather_bucket_size": _BY_DEVICE,
}
"""Keys whose default needs a word when it takes the place of "auto"."""


@dataclass
class SortedConfig:
    """A config in its clean form.

    Attributes:
        clean: keys of the models only; every "auto" is left out.
        findings: answers to all other keys, and to values that mean something else than they say.
        open: dotted keys whose "auto" waits for the model and the optimizer.
    """

    clean: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    open: set[str] = field(default_factory=set)


def sort_out(raw: Mapping[Any, Any]) -> SortedConfig:
    """Sorts all keys of `raw`, which stays as it is."""
    sorter = _Sorter()
    sorter.walk((), raw, Config)
    _offload_together(sorter.result)
    _leave_out_unused_checkpointing(sorter.result)
    return sorter.result


def case_of(rule: Rule, value: Any) -> Case | None:
    """The first case that holds the value. "auto" asks for what the engine does: it is noted where any value may be."""
    if value == AUTO and (auto := next((case for case in rule if _takes_auto(case)), None)) is not None:
        return auto
    return next((case for case in rule if case.values.hold(value)), None)


def _takes_auto(case: Case) -> bool:
    return (case.answer is Answer.NOTED and not case.becomes) or (
        case.answer is Answer.WORKS and case.values.hold(AUTO)
    )


class _Sorter:
    """Puts every value where it belongs; two values for one place are a contradiction."""

    def __init__(self) -> None:
        self.result = SortedConfig()
        self._origins: dict[tuple[Any, ...], str] = {}

    def walk(self, path: tuple[Any, ...], section: Mapping[Any, Any], model: type[Section] | None) -> None:
        """Sorts the keys of one section. `model` None: a section that only DeepSpeed has."""
        for key, value in section.items():
            dotted = ".".join(map(str, (*path, key)))
            is_own = model is not None and key in model.model_fields
            case = None if is_own and value == AUTO else case_of(RULES.get(dotted, ()), value)
            if case is not None:
                self._apply(case, dotted, value)
            elif model is not None and is_own:
                self._own(path, key, value, model, dotted)
            elif isinstance(key, str) and is_comment(key):
                self._apply(COMMENT, dotted, value)
            elif isinstance(value, Mapping) and any(rule.startswith(f"{dotted}.") for rule in RULES):
                self.walk((*path, key), value, None)
            elif model is None and value in (None, False):
                self._find(dotted, value, Answer.NOTED, "asks for nothing")
            elif model is None:
                self._find(dotted, value, Answer.REFUSED, explain_unknown_key(".".join(path), key, None), False)
            else:
                self._place((*path, key), value, dotted)

    def _own(self, path: tuple[Any, ...], key: Any, value: Any, model: type[Section], dotted: str) -> None:
        """A key of the models."""
        below = subsections(model).get(key)
        model_field = model.model_fields[key]
        if value == AUTO and below is None and not takes_auto(model_field) and not model_field.is_required():
            self._auto(dotted, model_field.default)
        elif dotted in FACTORIES and isinstance(value, Mapping) and isinstance(value.get("type"), str):
            self._factory(dotted, value)
        elif below is not None and value is None:
            if may_be_null(model_field.annotation):
                self._place((*path, key), None, dotted)
            else:
                self._find(dotted, value, Answer.NOTED, "asks for nothing")
        elif below is not None and isinstance(value, Mapping):
            self._place((*path, key), {}, dotted)
            self.walk((*path, key), value, below)
        else:
            self._place((*path, key), value, dotted)

    def _auto(self, dotted: str, default: Any) -> None:
        if dotted in OPEN:
            self.result.open.add(dotted)
        reason = OPEN.get(dotted) or _SAID.get(dotted) or f"is {default!r}, the default"
        self._find(dotted, AUTO, Answer.NOTED, reason)

    def _factory(self, dotted: str, section: Mapping[Any, Any]) -> None:
        """The section of an optimizer or a schedule, whose params depend on its type."""
        params = section.get("params", {})
        rest = {key: value for key, value in section.items() if key not in ("type", "params")}
        self._place((dotted,), {}, dotted)
        if not isinstance(params, Mapping):
            self._place((dotted, "type"), section["type"], dotted)
            self._place((dotted, "params"), params, dotted)
        else:
            self._take(dotted, sort_params(dotted, section["type"], params), params)
        self.walk((dotted,), rest, subsections(Config)[dotted])

    def _take(self, dotted: str, found: Sorted, params: Mapping[Any, Any]) -> None:
        self._place((dotted, "type"), found.type_name, dotted)
        if params or found.params:
            self._place((dotted, "params"), {}, dotted)
        for name, value in found.params.items():
            self._place((dotted, "params", name), value, dotted)
        self.result.findings += found.findings
        self.result.open |= {f"{dotted}.params.{name}" for name in found.open}

    def _apply(self, case: Case, dotted: str, value: Any) -> None:
        self._find(dotted, value, case.answer, case.reason)
        if case.becomes:
            self._walk_to(case.becomes, value if value == AUTO else case.convert(value), dotted)

    def _walk_to(self, dotted: str, value: Any, origin: str) -> None:
        """Sorts a value as if it stood at another key; the cases of that key are not asked again."""
        *path, key = dotted.split(".")
        model: type[Section] = Config
        for depth, name in enumerate(path):
            self._place(tuple(path[: depth + 1]), {}, origin)
            model = subsections(model)[name]
        below = subsections(model).get(key)
        if below is not None and isinstance(value, Mapping):
            self._place((*path, key), {}, origin)
            self.walk((*path, key), value, below)
        else:
            self._own(tuple(path), key, value, model, origin)

    def _place(self, target: tuple[Any, ...], value: Any, origin: str) -> None:
        *path, key = target
        home = self.result.clean
        for name in path:
            home = home.setdefault(name, {})
            if not isinstance(home, dict):
                return  # the section holds something else, which the models refuse
        if key not in home:
            home[key] = value
            self._origins[target] = origin
        elif value != {} and home[key] != value:
            other = self._origins[target]
            self._find(origin, value, Answer.REFUSED, f"{other} = {home[key]!r} says something else; keep one of them")

    def _find(self, key: str, value: Any, answer: Answer, reason: str, has_value: bool = True) -> None:
        self.result.findings.append(Finding(key, value, answer, reason, has_value=has_value))


def _offload_together(result: SortedConfig) -> None:
    """Parameters in host memory are updated there: so offload_param brings offload_optimizer with it."""
    zero = result.clean.get("zero_optimization")
    if not isinstance(zero, dict) or not _is_section(zero, "offload_param", "offload_optimizer"):
        return
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if zero.get("offload_param", {}).get("device", "none") == "cpu" and zero.get("stage") == 3 and device == "none":
        zero.setdefault("offload_optimizer", {})["device"] = "cpu"
        key = "zero_optimization.offload_optimizer.device"
        reason = 'is "cpu": parameters in host memory (offload_param) are updated there'
        result.findings.append(Finding(key, device, Answer.NOTED, reason))


def _leave_out_unused_checkpointing(result: SortedConfig) -> None:
    """In DeepSpeed the key acts on a function that models call themselves."""
    section = result.clean.get("activation_checkpointing")
    if isinstance(section, dict) and section.get("cpu_checkpointing") is True and not section.get("enabled"):
        del section["cpu_checkpointing"]
        reason = "it acts on the layers that activation_checkpointing.enabled checkpoints, and it is false"
        result.findings.append(Finding("activation_checkpointing.cpu_checkpointing", True, Answer.NOTED, reason))


def _is_section(section: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(section.get(key, {}), dict) for key in keys)


def leaves(clean: Mapping[Any, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section."""
    for key, value in clean.items():
        dotted = join(path, key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, dotted)
        else:
            yield dotted, value
