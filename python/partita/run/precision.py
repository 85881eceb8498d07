"""Number formats of a run, worked out from its config."""

from __future__ import annotations

from collections.abc import Iterable
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
    (communication).

    given: the 16-bit types of the parameters that the program has made so itself, where the config asks for none.
    """

    compute: torch.dtype | None
    grads: torch.dtype | None
    communication: torch.dtype | None
    buffers: torch.dtype | None
    autocast: torch.dtype | None
    given: frozenset[torch.dtype] = frozenset()

    @property
    def scales_loss(self) -> bool:
        """float16 gradients underflow unless the loss is scaled."""
        return torch.float16 in (self.compute, self.autocast, *self.given)

    @property
    def reduces_in_fp16(self) -> bool:
        """Whether gradients, those of some parameters at least, are summed over ranks in float16."""
        own = self.communication or self.grads
        return own is torch.float16 or (own is None and torch.float16 in (self.compute, *self.given))

    @property
    def is_half(self) -> bool:
        """Whether products are computed in 16 bits."""
        return self.compute is not None or self.autocast is not None or bool(self.given)

    @property
    def name(self) -> str:
        """For people."""
        if self.autocast is not None:
            return f"{self.autocast} autocast".removeprefix("torch.")
        if self.given:
            return f"{' and '.join(sorted(map(short_name, self.given)))} as the model is"
        return "fp32" if self.compute is None else short_name(self.compute)


def short_name(dtype: torch.dtype) -> str:
    """As the config names a type: fp32, fp16, bf16."""
    return next((name for name, known in DTYPES.items() if known is dtype), str(dtype).removeprefix("torch."))


def precision_of(config: Config, accumulation: int, dtypes: Iterable[torch.dtype] = ()) -> Precision:
    """Micro-batches are summed in fp32 when there are several, unless the config names another type.

    Args:
        dtypes: of the model's parameters. 16-bit ones have fp32 masters in any case. With float16 ones the loss is
            scaled, also if the config has no `fp16` section.
    """

    def dtype(name: str | None) -> torch.dtype | None:
        return None if name is None else DTYPES[name]

    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    grads = dtype(config.data_types.grad_accum_dtype)
    if grads is None and accumulation > 1:
        grads = torch.float32
    is_asked = compute is not None or config.torch_autocast.enabled
    return Precision(
        given=frozenset() if is_asked else frozenset(dtypes) & {torch.float16, torch.bfloat16},
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
