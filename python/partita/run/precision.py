"""Number formats of a run, worked out from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from partita._core import LossScaler

if TYPE_CHECKING:
    from partita.config import Config

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AUTOCAST_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """None stands for: as the model has it (compute, buffers), the parameters' (grads), the gradients'
    (communication)."""

    compute: torch.dtype | None
    grads: torch.dtype | None
    communication: torch.dtype | None
    buffers: torch.dtype | None
    autocast: torch.dtype | None

    @property
    def scales_loss(self) -> bool:
        """float16 gradients underflow unless the loss is scaled."""
        return torch.float16 in (self.compute, self.autocast)

    @property
    def name(self) -> str:
        """For people."""
        if self.autocast is not None:
            return f"{self.autocast} autocast".removeprefix("torch.")
        return "fp16" if self.compute is torch.float16 else "bf16" if self.compute is torch.bfloat16 else "fp32"


def precision_of(config: Config, accumulation: int) -> Precision:
    """Micro-batches are summed in fp32 when there are several, unless the config names another type."""

    def dtype(name: str | None) -> torch.dtype | None:
        return None if name is None else DTYPES[name]

    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    grads = dtype(config.data_types.grad_accum_dtype)
    if grads is None and accumulation > 1:
        grads = torch.float32
    return Precision(
        compute=compute,
        grads=grads,
        communication=dtype(config.communication_data_type),
        buffers=dtype(config.data_types.buffer_dtype),
        autocast=AUTOCAST_DTYPES[config.torch_autocast.dtype] if config.torch_autocast.enabled else None,
    )


def loss_scaler_of(config: Config, precision: Precision) -> LossScaler:
    """The scaler of a run; outside float16 the scale is fixed at 1."""
    fp16 = config.fp16
    dynamic = precision.scales_loss and fp16.loss_scale == 0
    initial = 2.0**fp16.initial_scale_power if dynamic else fp16.loss_scale if precision.scales_loss else 1.0
    return LossScaler(
        dynamic=dynamic,
        initial_scale=initial,
        minimum=fp16.min_loss_scale,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )
