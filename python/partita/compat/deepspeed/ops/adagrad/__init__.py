"""Adagrad under DeepSpeed's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["DeepSpeedCPUAdagrad"]


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """torch's Adagrad, which the engine runs over shards, where the states are.

    Args:
        model_params: parameters or param groups.
        amsgrad: False; no Adagrad has it.
        fp32_optimizer_states: True.
        lr, eps, weight_decay: as in torch.

    Raises:
        ValueError: `amsgrad` or states of another type are asked for, or a value is outside its range.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if amsgrad or not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdagrad: amsgrad=True and fp32_optimizer_states=False are not here")
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)
