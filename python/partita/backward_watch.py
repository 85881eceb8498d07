"""Noticing a backward that the engine did not start, and making sure that its loss is scaled once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BackwardWatch:
    """Sees gradients enter the model's outputs.

    `engine.backward(loss)` scales the loss and ends the backward itself. For a plain `loss.backward()`, hooks on the
    outputs of the forward do both: the first gradient that arrives asks autograd for a call at the end of the whole
    backward (a parameter's hook could run inside a reentrant checkpoint, whose end is not the end), and the gradient
    of a single output is multiplied by the loss scale, which does the same as scaling the loss.
    """

    def __init__(self, loss_scale: Callable[[], float], finish_backward: Callable[[], None]) -> None:
        self._loss_scale = loss_scale
        self._finish_backward = finish_backward
        self._outputs = 0  # of the last forward
        self._end_is_queued = False
        self.loss_is_scaled = False

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, in float32 unless the scale is 1."""
        self.loss_is_scaled = True
        scale = self._loss_scale()
        return loss if scale == 1.0 else loss.float() * scale

    def watch(self, outputs: list[Tensor]) -> None:
        """Called with the outputs of a forward that may be followed by a backward."""
        self._outputs = len(outputs)
        for output in outputs:
            output.register_hook(self._gradient_arrives)  # type: ignore[no-untyped-call]

    def begin_micro_batch(self) -> None:
        """The last micro-batch has ended, one way or another."""
        self.loss_is_scaled = False
        self._end_is_queued = False

    def require_scaled(self) -> None:
        """Called when parameters receive gradients; raises RuntimeError if the loss scale would be missing from
        them."""
        if not self.loss_is_scaled and self._loss_scale() != 1.0:
            raise RuntimeError(
                "loss.backward() in float16 without the loss scale: call engine.backward(loss), or "
                "engine.scale(loss).backward()"
            )

    def _gradient_arrives(self, grad: Tensor) -> Tensor | None:
        if not self._end_is_queued:
            self._end_is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        if self.loss_is_scaled or self._outputs != 1 or (scale := self._loss_scale()) == 1.0:
            return None
        self.loss_is_scaled = True
        return grad * scale

    def _end(self) -> None:
        self._end_is_queued = False
        self._finish_backward()
