"""DeepSpeed's `runtime.zero.partition_parameters`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from partita.compat.deepspeed._absent import absent_attribute
from partita.compat.deepspeed._config import one_config, translated
from partita.compat.deepspeed.accelerator.real_accelerator import get_accelerator
from partita.compat.deepspeed.runtime.zero.absent import name_all, name_all_that_is_built
from partita.zero import GatheredParameters, register_external_parameter, unregister_external_parameter
from partita.zero import Init as PartitaInit

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "get_accelerator",
    "register_external_parameter",
    "shutdown_init_context",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

_orig_torch_arange = torch.arange


class ZeroParamType(Enum):
    """What a parameter is to ZeRO."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(Enum):
    """Whether a partitioned parameter has its values on this rank."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Init(PartitaInit):
    """`partita.zero.Init` with a config of DeepSpeed's, under either of its two names.

    `state_dict()` of modules that are built inside names parameters that are partitioned, see `name_all()`.
    """

    def __init__(self, module: nn.Module | None = None, **kwargs: Any) -> None:
        config = one_config(None, {name: kwargs.pop(name, None) for name in ("config_dict_or_path", "config")})
        super().__init__(module, config=None if config is None else translated(config), **kwargs)
        self._handle: RemovableHandle | None = None
        for one in () if module is None else module.modules():
            name_all(one)

    def __enter__(self) -> Init:
        super().__enter__()
        if self._enabled:
            self._handle = name_all_that_is_built()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        super().__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        error = AttributeError(f"'Init' object has no attribute '{name}'")
        raise absent_attribute(name, ["deepspeed.zero.Init"], error)


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., torch.Tensor], target_fp_dtype: torch.dtype, target_device: torch.device | None
) -> Callable[..., torch.Tensor]:
    """A constructor whose floating-point tensors have a dtype, on a device unless the call names one.

    `Init` does not call this: inside it the default dtype is that of the model, and constructors are torch's.
    """

    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if target_device is not None and kwargs.get("device") is None:
            kwargs["device"] = target_device
        made = fn(*args, **kwargs)
        return made.to(target_fp_dtype) if made.is_floating_point() else made

    return construct


def shutdown_init_context() -> None:
    """Nothing: `initialize()` may be called inside `Init` as it is."""
