"""Floating-point inputs in the type that the parameters have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cast_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on the model takes floating-point inputs of any type, also in its own calls: they are cast to `dtype`,
    as `autocast` would in the first operation."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (_cast(args, dtype), _cast(kwargs, dtype)), with_kwargs=True
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
