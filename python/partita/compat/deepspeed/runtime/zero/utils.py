"""DeepSpeed's `runtime.zero.utils`: what a parameter is to ZeRO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partita.compat.deepspeed._absent import absent_names


def is_zero_param(parameter: Any) -> bool:
    """Whether a parameter is partitioned by an engine of stage 3; its `ds_shape` is that of the whole then."""
    return isinstance(parameter, Tensor) and hasattr(parameter, "ds_id")


__getattr__ = absent_names(__name__)
