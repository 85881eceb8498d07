"""Tensors that come from another stage, as autograd sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arrival:
    """A tensor of a stage's input whose gradient goes back to where the tensor came from.

    The stage gets what any layer gets of the one before: no leaf of autograd, so that layers may change it in place.

    Attributes:
        tensor: for the stage.
    """

    def __init__(self, values: Tensor) -> None:
        self._gradient: Tensor | None = None
        self._like = torch.empty_like(values, device="meta")
        anchor = torch.empty((), dtype=torch.float32, device=values.device, requires_grad=True)
        self.tensor: Tensor = _Arrive.apply(anchor, self, values)  # type: ignore[no-untyped-call]
        self._device = values.device

    def arrives(self, gradient: Tensor) -> None:
        """A backward has come to the beginning of the stage."""
        self._gradient = gradient

    def take_gradient(self) -> Tensor:
        """The gradient; zeros, if the stage has not used the tensor."""
        gradient, self._gradient = self._gradient, None
        return torch.zeros_like(self._like, device=self._device) if gradient is None else gradient


class _Arrive(torch.autograd.Function):
    """Hands values on as they are, with a history whose end is the arrival."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrival: Arrival, values: Tensor) -> Tensor:
        ctx.arrival = arrival
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.arrival.arrives(gradient)
        return None, None, None
