"""What the optimizers and schedules of this package take: names, values, defaults, meanings.

The checks of a config, the lists in docs/config.md and the schema are made from these tables. A test compares them with
the signatures of the classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from partita.config.answers import ANY, Rule, noted, only, refused

REQUIRED = object()
"""The default of a parameter that has none."""


@dataclass(frozen=True)
class Kind:
    """A set of values, in words, as a check and as JSON Schema."""

    words: str
    holds: Callable[[Any], bool]
    schema: dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an optimizer or of a schedule."""

    kind: Kind
    default: Any
    meaning: str

    @property
    def default_words(self) -> str:
        """For documents."""
        return "required" if self.default is REQUIRED else f"`{json.dumps(self.default)}`"


@dataclass(frozen=True)
class Factory:
    """An optimizer or a schedule that a config can name.

    Attributes:
        rules: answers to parameters that DeepSpeed or torch have and this one lacks.
    """

    summary: str
    parameters: dict[str, Parameter]
    rules: dict[str, Rule] = field(default_factory=dict)


def _is_number(value: Any, low: float = -math.inf, below: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < below


def _is_whole(value: Any, low: int) -> bool:
    return _is_number(value, low) and value == int(value)


def _each(kind: Kind) -> Kind:
    """One value for all param groups, or a list with one for each."""
    return Kind(
        f"{kind.words}, or a list with one for each param group",
        lambda value: all(map(kind.holds, value)) if isinstance(value, list | tuple) else kind.holds(value),
        {"anyOf": [kind.schema, {"type": "array", "items": kind.schema}]},
    )


def _count(low: int) -> Kind:
    return Kind(f"an integer >= {low}", lambda v: _is_whole(v, low), {"type": "integer", "minimum": low})


def _or_null(kind: Kind) -> Kind:
    schema = {"anyOf": [kind.schema, {"type": "null"}]}
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value), schema)


_NUMBER = Kind("a number >= 0", lambda v: _is_number(v, 0), {"type": "number", "minimum": 0})
_RATIO = Kind(
    "a number from 0 to 1", lambda v: _is_number(v, 0) and v <= 1, {"type": "number", "minimum": 0, "maximum": 1}
)
_BETA = Kind(
    "a number from 0, below 1",
    lambda v: _is_number(v, 0, 1),
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
)
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
_SHAPE = Kind('"log" or "linear"', lambda value: value in ("log", "linear"), {"enum": ["log", "linear"]})
_BETAS = Kind(
    "two numbers from 0, below 1",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_BETA.holds, value)),
    {"type": "array", "items": _BETA.schema, "minItems": 2, "maxItems": 2},
)
_LR, _STEPS = _each(_NUMBER), _count(1)

_IMPLEMENTATION = "it chooses an implementation, and the native one is always taken"
_NOT_NATIVE = "the native update does not have it: give initialize() an optimizer of torch.optim, or write false"
_OWN_WAY = "it belongs to another optimizer: remove it"

ADAM_MODES = (
    '"Adam" with a weight decay is AdamW in DeepSpeed (the decay shrinks the weights) and L2 in torch (the decay joins '
    'the gradient): write type "AdamW" for the first, or "adam_w_mode": false in params for the second'
)
"""What is said where a config could mean either."""

_ADAM_RULES: dict[str, Rule] = {
    **{name: (noted(_IMPLEMENTATION),) for name in ("torch_adam", "fused", "foreach", "set_grad_none")},
    **{
        name: (noted("asks for nothing", only(False, None)), refused(_NOT_NATIVE))
        for name in ("amsgrad", "maximize", "capturable", "differentiable")
    },
    "fp32_optimizer_states": (
        noted("moments are always fp32", only(True, None)),
        refused("moments are always fp32: remove it"),
    ),
    "max_grad_norm": (refused("use gradient_clipping at the top level, and remove it", ANY),),
    **{
        name: (refused(_OWN_WAY, ANY),)
        for name in ("freeze_step", "cuda_aware", "comm_backend_name", "max_coeff", "min_coeff")
    },
}
_ADAM = {
    "lr": Parameter(_NUMBER, 0.001, "learning rate"),
    "betas": Parameter(_BETAS, [0.9, 0.999], "decay rates of the two moments"),
    "eps": Parameter(_NUMBER, 1e-8, "added to the denominator"),
    "bias_correction": Parameter(_SWITCH, True, "false: moments, which start at zero, are used as they are"),
    "weight_decay": Parameter(_NUMBER, 0.0, "zero as in DeepSpeed; torch's AdamW has 0.01"),
}

OPTIMIZERS: dict[str, Factory] = {
    "AdamW": Factory(
        "Adam with decoupled weight decay, native.",
        _ADAM,
        {
            **_ADAM_RULES,
            "adam_w_mode": (noted("the name AdamW says it, in DeepSpeed too"),),
        },
    ),
    "Adam": Factory(
        "Adam, native. With a weight decay it has to be said which one.",
        {
            **_ADAM,
            "adam_w_mode": Parameter(
                _or_null(_SWITCH),
                None,
                "true: the decay shrinks the weights, as AdamW's; false: it joins the gradient (L2)",
            ),
        },
        _ADAM_RULES,
    ),
}
"""The native optimizers. Names are found whatever their case."""

_ONE_BIT = "there are no 1-bit optimizers: use AdamW; communication_data_type can halve the traffic"
_LAMB = "there is no Lamb, which needs norms of whole layers: use AdamW"
_MUP = "there is no mup: give initialize() the optimizer as an object, which stage 0 runs whatever it is"

REFUSED_OPTIMIZERS: dict[str, str] = {
    "lamb": _LAMB,
    "fusedlamb": _LAMB,
    "onebitadam": _ONE_BIT,
    "onebitlamb": _ONE_BIT,
    "zerooneadam": _ONE_BIT,
    "muon": "Muon needs whole matrices, which no rank has: use AdamW",
    "muadam": _MUP,
    "muadamw": _MUP,
    "musgd": _MUP,
    "lion": "there is no Lion here: give initialize() one as an object, which runs over shards",
}
"""Optimizers that DeepSpeed knows by these names, in lower case, and Partita does not -> what to do."""

_WARMUP = {
    "warmup_min_lr": Parameter(_LR, 0.0, "where it starts"),
    "warmup_max_lr": Parameter(_or_null(_LR), None, "where the warm-up ends; null: the optimizer's `lr`"),
    "warmup_num_steps": Parameter(_STEPS, 1000, "steps of the warm-up, at least 2"),
    "warmup_type": Parameter(_SHAPE, "log", "the shape of the warm-up"),
}
_TOTAL = Parameter(_STEPS, REQUIRED, "optimizer steps of the run, with those of the warm-up")
_LAST = {"last_batch_iteration": Parameter(_count(-1), -1, "-1: from the start; n: goes on after n + 1 steps")}

SCHEDULES: dict[str, Factory] = {
    "WarmupLR": Factory("A warm-up, then constant.", {**_WARMUP, **_LAST}),
    "WarmupDecayLR": Factory(
        "A warm-up, then linear decay to `warmup_min_lr`.",
        {
            "total_num_steps": _TOTAL,
            **_WARMUP,
            "warmup_max_lr": Parameter(_or_null(_LR), 0.001, "where the warm-up ends; null: the optimizer's `lr`"),
            **_LAST,
        },
    ),
    "WarmupCosineLR": Factory(
        "The optimizer's `lr` times a ratio: a warm-up, then a cosine.",
        {
            "total_num_steps": _TOTAL,
            "warmup_min_ratio": Parameter(_RATIO, 0.0, "where it starts"),
            "warmup_num_steps": _WARMUP["warmup_num_steps"],
            "cos_min_ratio": Parameter(_RATIO, 0.0001, "where the cosine ends"),
            "warmup_type": _WARMUP["warmup_type"],
            **_LAST,
        },
    ),
    "OneCycle": Factory(
        "One triangle of the learning rate, and of beta1 the other way round, then a decay.",
        {
            "cycle_min_lr": Parameter(_LR, REQUIRED, "foot of the triangle"),
            "cycle_max_lr": Parameter(_LR, REQUIRED, "its top"),
            "decay_lr_rate": Parameter(_NUMBER, 0.0, "decay after the cycle"),
            "cycle_first_step_size": Parameter(_STEPS, 2000, "steps up"),
            "cycle_second_step_size": Parameter(_or_null(_count(0)), None, "steps down; null: as many"),
            "cycle_first_stair_count": Parameter(_count(0), 0, "stairs up; 0: a slope"),
            "cycle_second_stair_count": Parameter(_or_null(_count(0)), None, "stairs down; null: as many"),
            "decay_step_size": Parameter(_count(0), 0, "steps of a decay interval; 0: no decay"),
            "cycle_momentum": Parameter(_SWITCH, True, "whether beta1 moves too"),
            "cycle_min_mom": Parameter(_each(_BETA), 0.8, "beta1 at the top"),
            "cycle_max_mom": Parameter(_each(_BETA), 0.9, "beta1 at the foot"),
            "decay_mom_rate": Parameter(_NUMBER, 0.0, "growth of beta1 after the cycle"),
            **_LAST,
        },
    ),
    "LRRangeTest": Factory(
        "Grows without end, to find where training diverges.",
        {
            "lr_range_test_min_lr": Parameter(_LR, 0.001, "the first"),
            "lr_range_test_step_size": Parameter(_STEPS, 2000, "steps of an interval"),
            "lr_range_test_step_rate": Parameter(_NUMBER, 1.0, "growth in an interval"),
            "lr_range_test_staircase": Parameter(_SWITCH, False, "grow once in an interval, not at every step"),
            **_LAST,
        },
    ),
}
"""DeepSpeed's schedules, with the names that it gives them."""
