"""The loss scale as losses and gradients meet it.

[Note: whose scale]
The gradients of a backward carry the scale of the loss that it began with. A backward may go through the models of
several engines, `B.backward(B(A(x)))`, and each has a loss scale of its own. So the scale belongs to the running
backward. What keeps a scale alive is a callback that autograd has for the end of that backward, also when the backward
ends with an exception. Others find it in autograd's thread-local state, which torch hands on to every thread that works
for a backward: there is a `Carried` for each thread that starts backwards, which points to the scale weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_KEY = "partita.carried_loss_scale"


class _CarriedScale:
    """The scale of one backward, and what autograd calls at its end.

    owner: who has scaled the loss. factor: what the loss was multiplied by, one float64.
    """

    def __init__(self, owner: LossScaling, factor: Tensor) -> None:
        self.owner = owner
        self.factor = factor
        self.is_over = False

    def __call__(self) -> None:
        self.is_over = True


class Carried:
    """Which scale the gradients of the backward under way carry, of those that the same thread has started."""

    def __init__(self) -> None:
        self._scale: weakref.ref[_CarriedScale] | None = None

    @property
    def scale(self) -> _CarriedScale | None:
        """The scale; None if no loss of the backward under way was scaled."""
        scale = None if self._scale is None else self._scale()
        return None if scale is None or scale.is_over else scale

    @scale.setter
    def scale(self, scale: _CarriedScale) -> None:
        """A backward begins, whose end is the end of this scale."""
        self._scale = weakref.ref(scale)


def _carried() -> Carried:
    """That of the thread that started the backward under way, or of this thread."""
    if not torch._C._is_key_in_tls(_KEY):
        torch._C._stash_obj_in_tls(_KEY, Carried())
    found: Carried = torch._C._get_obj_in_tls(_KEY)
    return found


class LossScaling:
    """Scales losses before backward, and knows which scale the gradients of the backward under way carry.

    `engine.backward(loss)` and `engine.scale(loss).backward()` scale the loss. The gradients of a plain
    `loss.backward()` lack the scale and are multiplied by it as they are packed. That is exact for every loss; only the
    protection against underflow on the way there is lost. Gradients that carry the scale of another engine's loss are
    multiplied by what lies between the two, see [Note: whose scale].

    All parts of a model share one `LossScaling`: a backward that goes through several of them carries one scale.

    Args:
        scale: one float64 on the device of the loss, so that nobody waits for it. None: losses are not scaled.
    """

    def __init__(self, scale: Tensor | None) -> None:
        self._scale = scale
        self._is_scaled = False
        self._own = Carried()  # of a backward that began with a loss of this one's

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, in float32; the loss itself where losses are not scaled."""
        if self._scale is None:
            return loss
        factor = self._scale.clone()
        scaled = loss.float() * factor.float().reshape(())
        if scaled.requires_grad:
            carried = _carried()  # made here if need be: a backward takes along what its thread has when it starts

            def arrives(_grad: Tensor) -> None:
                self._scaled_loss_arrives(factor, carried)

            scaled.register_hook(arrives)  # type: ignore[no-untyped-call]
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
        if self._is_scaled or self._own.scale is not None:
            return None
        carried = _carried().scale
        if carried is None:
            return self._scale
        own = torch.ones_like(carried.factor) if self._scale is None else self._scale
        return own / carried.factor.to(own.device)

    def value(self) -> float:
        """The scale, for the host; on a GPU the host waits for it."""
        return 1.0 if self._scale is None else float(self._scale.item())

    def forget(self) -> None:
        """The next backward begins with nothing scaled."""
        self._is_scaled = False

    def _scaled_loss_arrives(self, factor: Tensor, carried: Carried) -> None:
        """A backward begins with a scaled loss, or another one joins it."""
        under_way = carried.scale
        if under_way is not None and under_way.owner is not self:
            raise RuntimeError(
                "two losses in one backward were scaled by two engines, whose loss scales differ: give the sum of the "
                "losses to backward() or scale() of one of them, or run one backward per engine"
            )
        if under_way is None:
            scale = self._own.scale = carried.scale = _CarriedScale(self, factor)
            torch.autograd.Variable._execution_engine.queue_callback(scale)
