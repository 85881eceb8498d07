"""Noticing a backward that the engine did not start, and whether its loss was scaled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BackwardWatch:
    """Follows one backward at a time, from the first gradient to the last.

    `engine.backward(loss)` scales the loss and ends the backward itself. For a plain `loss.backward()`, a hook on the
    outputs of the forward asks autograd for a call at the end of the whole backward (a parameter's hook could run
    inside a reentrant checkpoint, whose end is not the end). Its gradients lack the loss scale, and are multiplied by
    it as they are packed. That is exact for every loss; only the protection against underflow on the way there is lost.

    Args:
        loss_scale: one float64 where the loss is, so that nobody waits for it; None: losses are not scaled.
        finish_backward: called when a backward that the engine did not start has ended.
    """

    def __init__(self, loss_scale: Tensor | None, finish_backward: Callable[[], None]) -> None:
        self._loss_scale = loss_scale
        self._finish_backward = finish_backward
        self._end_is_queued = False
        self._loss_is_scaled = False

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, in float32; the loss itself where losses are not scaled."""
        if self._loss_scale is None:
            return loss
        scaled = loss.float() * self._loss_scale.float().reshape(())
        if scaled.requires_grad:
            scaled.register_hook(self._scaled_loss_arrives)  # type: ignore[no-untyped-call]
        return scaled

    def watch(self, outputs: list[Tensor]) -> None:
        """Called with the outputs of a forward that may be followed by a backward."""
        for output in outputs:
            output.register_hook(self._gradient_arrives)  # type: ignore[no-untyped-call]

    def missing_scale(self) -> Tensor | None:
        """What the gradients of the backward under way must be multiplied by to be those of a scaled loss; None: 1."""
        return None if self._loss_is_scaled else self._loss_scale

    def backward_ended(self) -> None:
        """The last backward has ended, one way or another; the next one starts with nothing scaled."""
        self._end_is_queued = False
        self._loss_is_scaled = False

    def _scaled_loss_arrives(self, _grad: Tensor) -> None:
        self._loss_is_scaled = True

    def _gradient_arrives(self, _grad: Tensor) -> None:
        if not self._end_is_queued:
            self._end_is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self.backward_ended()
        self._finish_backward()
