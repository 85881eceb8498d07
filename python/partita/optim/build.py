"""The optimizer that the config names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from partita.config import suggest
from partita.optim.fused_adam import FusedAdam

NATIVE = {"Adam": False, "AdamW": True}  # name -> decoupled weight decay


def make_optimizer(type_name: str, params: Mapping[str, Any], parameters: Any) -> Optimizer:
    """The optimizer `type_name` over parameters or param groups.

    "Adam" (L2 decay) and "AdamW" (decoupled decay) are native and take lr, betas, eps and weight_decay; every other
    name is a class of torch.optim.

    Raises:
        ValueError: an unknown name or argument, with the nearest valid spelling, or a value the optimizer refuses.
    """
    names = {name.lower(): name for name in (*NATIVE, *_torch_optimizers())}
    name = names.get(type_name.lower())
    if name is None:
        raise ValueError(f"optimizer.type: unknown optimizer '{type_name}'{suggest(type_name, names.values())}")
    options = dict(params)
    make: type[Optimizer]
    if name in NATIVE:
        valid = {"lr", "betas", "eps", "weight_decay"}
        make = FusedAdam
    else:
        make = _torch_optimizers()[name]
        valid = set(inspect.signature(make).parameters) - {"params"}
    for key in options:
        if key not in valid:
            raise ValueError(f"optimizer.params: {name} has no argument '{key}'{suggest(key, sorted(valid))}")
    if name in NATIVE:
        options["decoupled_weight_decay"] = NATIVE[name]
    try:
        return make(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.params: {name} refuses them: {error}") from None


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
