"""The loss scale as losses and gradients meet it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class LossScaling:
    """Scales losses before backward, and knows whether the gradients of the backward under way are scaled.

    `engine.backward(loss)` and `engine.scale(loss).backward()` scale the loss. The gradients of a plain
    `loss.backward()` lack the scale and are multiplied by it as they are packed. That is exact for every loss; only the
    protection against underflow on the way there is lost.

    All parts of a model share one `LossScaling`: a backward that goes through several of them carries one scale.

    Args:
        scale: one float64 on the device of the loss, so that nobody waits for it. None: losses are not scaled.
    """

    def __init__(self, scale: Tensor | None) -> None:
        self._scale = scale
        self._is_scaled = False

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, in float32; the loss itself where losses are not scaled."""
        if self._scale is None:
            return loss
        scaled = loss.float() * self._scale.float().reshape(())
        if scaled.requires_grad:
            scaled.register_hook(self._scaled_loss_arrives)  # type: ignore[no-untyped-call]
        return scaled

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """The gradients of backwards in this block are scaled."""
        self._is_scaled = True
        try:
            yield
        finally:
            self._is_scaled = False

    def missing(self) -> Tensor | None:
        """What the gradients of the backward under way must be multiplied by to be those of a scaled loss; None: 1."""
        return None if self._is_scaled else self._scale

    def value(self) -> float:
        """The scale, for the host; on a GPU the host waits for it."""
        return 1.0 if self._scale is None else float(self._scale.item())

    def forget(self) -> None:
        """The next backward begins with nothing scaled."""
        self._is_scaled = False

    def _scaled_loss_arrives(self, _grad: Tensor) -> None:
        self._is_scaled = True
