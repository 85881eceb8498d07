"""`partita.FusedAdam` with the arguments of DeepSpeed's Adams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import partita
from partita.compat.deepspeed._absent import absent_names

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]


class FusedAdam(partita.FusedAdam):
    """Adam or AdamW in one pass over memory, on the CPU and on GPUs.

    Args:
        params: parameters or param groups.
        adam_w_mode: True: AdamW, the decay is decoupled; False: Adam, the decay joins the gradient.
        amsgrad: False.
        set_grad_none: as `zero_grad()` does it when it is called without an argument.
        lr, bias_correction, betas, eps, weight_decay: as in `partita.FusedAdam`.

    Raises:
        ValueError: `amsgrad` is asked for, or a value is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        _refuse_amsgrad(amsgrad)
        super().__init__(params, lr, betas, eps, weight_decay, adam_w_mode, bias_correction)
        self.adam_w_mode = int(adam_w_mode)
        self.set_grad_none = set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """As torch's; None: as `set_grad_none` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


class DeepSpeedCPUAdam(partita.FusedAdam):
    """The same update; it runs where the parameters are, or where the engine has the states (`offload_optimizer`).

    Args:
        model_params: parameters or param groups.
        amsgrad: False.
        adamw_mode: True: AdamW; False: Adam.
        fp32_optimizer_states: True: moments are float32 always.
        lr, bias_correction, betas, eps, weight_decay: as in `partita.FusedAdam`.

    Raises:
        ValueError: `amsgrad` or states of another type are asked for, or a value is outside its range.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _refuse_amsgrad(amsgrad)
        if not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdam: fp32_optimizer_states=False: moments are float32; leave it out")
        super().__init__(model_params, lr, betas, eps, weight_decay, adamw_mode, bias_correction)
        self.adam_w_mode = adamw_mode


def _refuse_amsgrad(amsgrad: bool) -> None:
    if amsgrad:
        raise ValueError("amsgrad=True: the native Adam has none; use torch.optim.AdamW(amsgrad=True)")


__getattr__ = absent_names(__name__)
