"""The optimizer that the config names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from partita.config import ADAM_MODES, OPTIMIZERS, suggest
from partita.optim.fused_adam import FusedAdam

NATIVE = tuple(OPTIMIZERS)


def make_optimizer(type_name: str, params: Mapping[str, Any], parameters: Any) -> Optimizer:
    """The optimizer `type_name` over parameters or param groups.

    "Adam" and "AdamW" are native; what they take stands in docs/config.md. Every other name is a class of torch.optim.

    Raises:
        ValueError: an unknown name or argument, with the nearest valid spelling, a value that the optimizer refuses, or
            "Adam" with a weight decay and without `adam_w_mode`, which means two things.
    """
    name = require_optimizer(type_name, params)
    options = dict(params)
    make: type[Optimizer]
    if name in NATIVE:
        make = FusedAdam
        mode = options.pop("adam_w_mode", None)
        groups = list(parameters)
        if name == "Adam" and mode is None:
            _require_no_decay(options, groups)
        options["decoupled_weight_decay"] = name == "AdamW" or bool(mode)
        parameters = groups
    else:
        make = _torch_optimizers()[name]
    try:
        return make(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.params: {name} refuses them: {error}") from error


def require_optimizer(type_name: str, params: Mapping[str, Any]) -> str:
    """The name of an optimizer, as it is spelled, which takes these arguments.

    Raises:
        ValueError: an unknown name or argument, with the nearest valid spelling.
    """
    names = {name.lower(): name for name in (*NATIVE, *_torch_optimizers())}
    name = names.get(type_name.lower())
    if name is None:
        raise ValueError(f"optimizer.type: unknown optimizer '{type_name}'{suggest(type_name, names.values())}")
    if name in NATIVE:
        valid = {*OPTIMIZERS[name].parameters, "adam_w_mode"}
    else:
        valid = set(inspect.signature(_torch_optimizers()[name]).parameters) - {"params"}
    for key in params:
        if key not in valid:
            raise ValueError(f"optimizer.params: {name} has no argument '{key}'{suggest(key, sorted(valid))}")
    return name


def _require_no_decay(options: Mapping[str, Any], groups: list[Any]) -> None:
    if options.get("weight_decay"):
        raise ValueError(f"optimizer.params.weight_decay = {options['weight_decay']}: {ADAM_MODES}")
    for i, group in enumerate(groups):
        if isinstance(group, dict) and group.get("weight_decay"):
            raise ValueError(
                f"model_parameters: weight_decay = {group['weight_decay']} in param group {i}: {ADAM_MODES}"
            )


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
