"""Building a model on a device and in a dtype."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from typing_extensions import Self


class OnDevice:
    """In this block tensors are made on a device, the floating-point ones with a dtype unless it is given.

    Args:
        dtype: torch.float16, say.
        device: "meta": nothing has values, see `partita.zero.materialize`.
        enabled: False: the block has no effect.
    """

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self.dtype = dtype
        self.device = device
        self.enabled = enabled
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        if self.enabled:
            self._exits.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            self._exits.enter_context(torch.device(self.device))
        return self

    def __exit__(self, *exception: object) -> None:
        self._exits.close()
