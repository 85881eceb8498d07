"""DeepSpeed's tools: whole parameters of a partitioned model, logging, building a model elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

import partita
from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.utils import groups
from partita.compat.deepspeed.utils.groups import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_model_parallel_rank,
    get_model_parallel_world_size,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_src_rank,
    get_tensor_model_parallel_world_size,
)
from partita.compat.deepspeed.utils.init_on_device import OnDevice
from partita.compat.deepspeed.utils.logging import log_dist, log_dist_once, logger, set_log_level_from_string
from partita.utils import *  # noqa: F403  # all of them have DeepSpeed's names
from partita.utils import safe_get_full_grad, safe_set_full_grad

__all__ = [
    "OnDevice",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_default_deepspeed_config",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size",
    "groups",
    "instrument_w_nvtx",
    "log_dist",
    "log_dist_once",
    "logger",
    "safe_update_full_grad_vectorized",
    "set_log_level_from_string",
]
__all__ += partita.utils.__all__


def get_default_deepspeed_config() -> dict[str, Any]:
    """A config to begin with, a dict: see `partita.default_config`."""
    return partita.default_config()


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replaces the gradient of each parameter that has one by `update_func(gradient, parameter)`; a collective."""
    for parameter in param_list:
        gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            safe_set_full_grad(parameter, update_func(gradient, parameter))


def instrument_w_nvtx(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as a range of its name in a profile of a GPU."""

    @wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.nvtx.range(func.__qualname__) if torch.cuda.is_available() else nullcontext():
            return func(*args, **kwargs)

    return wrapped


__getattr__ = absent_names(__name__)
