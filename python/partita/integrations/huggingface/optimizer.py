"""The optimizer that `prepare()` returns: its `step()` is the engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from partita import Engine


class PartitaOptimizer(AcceleratedOptimizer):
    """The hyper-parameters of the program's optimizer, and the steps of an engine.

    Outside of a micro-batch that ends a step (`accelerator.sync_gradients`), `step()` and `zero_grad()` do nothing, as
    those of Accelerate.

    Args:
        engine: which trains the parameters of the optimizer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._is_early = False  # clip() has taken the step that step() is about to ask for
        self._bound = 0.0  # of that step
        self._is_outcome_due = False
        super().__init__(engine.optimizer, device_placement=False)
        self._is_accelerate_prepared = True  # so Accelerate takes it as it is

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Updates the parameters, unless `clip()` has.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("optimizer.step(closure): the engine has the gradients already: compute the loss before")
        if not self.gradient_state.sync_gradients:
            return
        if not self._is_early:
            self._take_step(self.engine.config.gradient_clipping)
        self._is_early = False

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drops the gradients since the last step, which has dropped its own.

        Raises:
            RuntimeError: `clip()` has taken a step that `step()` never asked for.
        """
        if self.gradient_state.sync_gradients:
            self.require_asked()
            self.engine.zero_grad()

    def clip(self, max_norm: float) -> Tensor:
        """Takes the step, with gradients of at most this norm together, so that their norm is known; `step()` does
        nothing then. Returns the norm before clipping, float32.

        Raises:
            RuntimeError: the step was taken already, with another bound.
        """
        if not self._is_early:
            self._take_step(max_norm)
            self._is_early, self._bound = True, max_norm
        elif max_norm != self._bound:
            raise RuntimeError(
                f"clip_grad_norm_(max_norm={max_norm:g}): this step was taken with max_norm={self._bound:g} before: "
                "call it once in a step, with the smaller bound"
            )
        return self.norm()

    def norm(self) -> Tensor:
        """That of the last step, float32; NaN before the first one. Nobody waits for it."""
        return self.engine.grad_norm_tensor()

    def require_asked(self) -> None:
        """Raises RuntimeError if the program has clipped, and goes on without the step."""
        if self._is_early:
            self._is_early = False
            raise RuntimeError(
                "clip_grad_norm_() has updated the parameters, as the norm is known then, and optimizer.step() was not "
                "called: a step cannot be left out after clip_grad_norm_(); decide before, or bound the norm"
            )

    def settle(self) -> None:
        """What became of the last step is known before the engine goes on."""
        if self._is_outcome_due:
            self._is_overflow = not self.engine.was_step_applied()
            self._is_outcome_due = False

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, as gradients were not finite. On a GPU the host waits for it."""
        self.settle()
        return bool(self._is_overflow)

    def _take_step(self, max_norm: float) -> None:
        self.engine.set_gradient_clipping(max_norm)
        self.engine.step()
        self._is_outcome_due = True
