"""Whole parameters, gradients and optimizer states by parameter, in every ZeRO stage; leaf modules of stage 3.

What gets or sets values is a collective: every rank calls it for the same parameters in the same order, between steps
(gradients: between `engine.backward()` and `engine.step()`). What it returns is a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from partita.data import RepeatingLoader
from partita.model import ParameterAccess, access_of
from partita.units import Unit
from partita.zero import (
    get_z3_leaf_modules,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)

__all__ = [
    "RepeatingLoader",
    "get_z3_leaf_modules",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


Function = TypeVar("Function", bound=Callable[..., Any])


def _named(function: Function) -> Function:
    """Ranks that do something else while a rank is in this function learn its name."""
    name = f"{function.__name__}()"

    @wraps(function)
    def called(param: nn.Parameter, *args: Any, **kwargs: Any) -> Any:
        access = access_of(param)
        with nullcontext() if access is None else access.calling(name):
            return function(param, *args, **kwargs)

    return cast(Function, called)


@_named
def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master weights of a parameter, in its shape; None if no engine trains it."""
    found = _find(param)
    return None if found is None else found[0].weights(found[1], param)


@_named
def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """The gradient that the step will use, before clipping: fp32, the mean over micro-batches and ranks.

    None if no engine trains the parameter, or there has been no backward since the last step.

    Raises:
        RuntimeError: before the last micro-batch of a step, when ranks have not shared their gradients (stages 0, 1).
    """
    found = _find(param)
    return None if found is None else found[0].gradient(found[1], param)


@_named
def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """An optimizer state of a parameter (`exp_avg`, `exp_avg_sq`, ...), fp32, in its shape; None if there is none."""
    found = _find(param)
    return None if found is None else found[0].state(found[1], param, optim_state_key)


@_named
def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replaces master weights and parameter by `value`, which is the same on all ranks.

    Raises:
        ValueError: no engine trains the parameter, or the shape differs.
    """
    access, unit = _require(param, value)
    access.set_weights(unit, param, value)


@_named
def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replaces the mean gradient by `value`, which is the same on all ranks; errors as in `safe_set_full_fp32_param`.

    Raises:
        RuntimeError: there is no gradient at this time.
    """
    access, unit = _require(param, value)
    access.set_gradient(unit, param, value)


@_named
def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replaces an optimizer state by `value`, which is the same on all ranks; errors as in `safe_set_full_fp32_param`.

    Raises:
        KeyError: the optimizer has no such state.
    """
    access, unit = _require(param, value)
    access.set_state(unit, param, optim_state_key, value)


def _find(parameter: nn.Parameter) -> tuple[ParameterAccess, Unit] | None:
    access = access_of(parameter)
    return None if access is None else (access, access.unit_of(parameter))


def _require(parameter: nn.Parameter, value: Tensor) -> tuple[ParameterAccess, Unit]:
    found = _find(parameter)
    if found is None:
        raise ValueError(f"no engine trains this parameter of shape {tuple(parameter.shape)}")
    if value.shape != parameter.shape:
        name, shape = found[1].name_of(parameter), tuple(parameter.shape)
        raise ValueError(f"parameter '{name}' has shape {shape}, the value {tuple(value.shape)}")
    return found
