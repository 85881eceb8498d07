"""Noticing a backward that the engine did not start, and making sure that its loss is scaled once."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import torch
from torch import Tensor

UNSCALED = (
    "loss.backward() in float16 without the loss scale: call engine.backward(loss), or engine.scale(loss).backward()"
)


class Scaled(Enum):
    """Where the loss scale entered the backward under way."""

    NOT_YET = auto()
    AT_LOSS = auto()  # engine.scale(), for every gradient
    AT_OUTPUT = auto()  # the only output that the loss depends on


class BackwardWatch:
    """Sees gradients enter the model's outputs.

    `engine.backward(loss)` scales the loss and ends the backward itself. For a plain `loss.backward()`, hooks on the
    outputs of the forward do both: the first gradient that arrives asks autograd for a call at the end of the whole
    backward (a parameter's hook could run inside a reentrant checkpoint, whose end is not the end), and the gradient
    of the output is multiplied by the loss scale, which does the same as scaling the loss. When gradients arrive at
    several outputs, of one forward or of two, one may have been computed from another and its gradient be scaled
    already: then only the caller can scale.
    """

    def __init__(self, loss_scale: Callable[[], float], finish_backward: Callable[[], None]) -> None:
        self._loss_scale = loss_scale
        self._finish_backward = finish_backward
        self._end_is_queued = False
        self._scaled = Scaled.NOT_YET

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, in float32 unless the scale is 1."""
        scale = self._loss_scale()
        if scale == 1.0:
            return loss
        scaled = loss.float() * scale
        if scaled.requires_grad:
            scaled.register_hook(self._scaled_loss_arrives)  # type: ignore[no-untyped-call]
        return scaled

    def watch(self, outputs: list[Tensor]) -> None:
        """Called with the outputs of a forward that may be followed by a backward."""
        for output in outputs:
            output.register_hook(self._gradient_arrives)  # type: ignore[no-untyped-call]

    def backward_ended(self) -> None:
        """The last backward has ended, one way or another; the next one starts with nothing scaled."""
        self._end_is_queued = False
        self._scaled = Scaled.NOT_YET

    def require_scaled(self) -> None:
        """Called when parameters receive gradients; raises RuntimeError if the loss scale would be missing from
        them."""
        if self._scaled is Scaled.NOT_YET and self._loss_scale() != 1.0:
            raise RuntimeError(UNSCALED)

    def loss_is_scaled(self) -> None:
        """The loss scale entered at the loss, whether or not its gradient went through any of the hooks."""
        self._scaled = Scaled.AT_LOSS

    def _scaled_loss_arrives(self, _grad: Tensor) -> None:
        self.loss_is_scaled()

    def _gradient_arrives(self, grad: Tensor) -> Tensor | None:
        if not self._end_is_queued:
            self._end_is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if self._scaled is Scaled.AT_LOSS or (scale := self._loss_scale()) == 1.0:
            return None
        if self._scaled is Scaled.AT_OUTPUT:
            raise RuntimeError(f"{UNSCALED} (the loss depends on several outputs of the model)")
        self._scaled = Scaled.AT_OUTPUT
        return grad * scale

    def _end(self) -> None:
        self.backward_ended()
        self._finish_backward()
