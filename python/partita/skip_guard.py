"""Ends a run whose steps are all skipped, and says where the non-finite gradients come from."""

from __future__ import annotations

import torch

from partita.comm import Communicator
from partita.optim import StepController
from partita.units import GradientReducer


class SkipGuard:
    """Counts on the loss scale's state, which is the same on every rank, so all ranks raise together.

    Reduced gradients no longer tell which rank they come from, so if one more skipped step would end the run, the
    reducer is asked to look at every gradient before it is reduced.

    Args:
        limit: skipped steps in a row that end a run.
        minimum_scale: the smallest loss scale; overflowing there ends a run at once.
    """

    def __init__(
        self,
        controller: StepController,
        reducer: GradientReducer,
        communicator: Communicator,
        *,
        limit: int,
        minimum_scale: float,
    ) -> None:
        self._controller = controller
        self._reducer = reducer
        self._communicator = communicator
        self._limit = limit
        self._minimum_scale = minimum_scale
        self._look_ahead()

    def check(self, step: int) -> None:
        """Called after every optimizer step, before its gradients are forgotten.

        Raises:
            FloatingPointError: the limit or the minimum scale is reached; names ranks and parameters.
        """
        state = self._controller.loss_scale
        if state.at_minimum:
            what = f"the loss scale is at its minimum, {state.scale:g}, and gradients still overflow"
        elif state.consecutive_skips >= self._limit:
            what = f"{state.consecutive_skips} steps in a row were skipped because gradients are not finite"
        else:
            self._look_ahead()
            return
        raise FloatingPointError(f"training stopped at step {step}: {what}; {self._origin()}")

    def _look_ahead(self) -> None:
        state = self._controller.loss_scale
        at_minimum = state.hysteresis <= 1 and state.scale <= self._minimum_scale
        self._reducer.find_non_finite = at_minimum or state.consecutive_skips + 1 >= self._limit

    def _origin(self) -> str:
        """Which ranks made non-finite gradients, and in which parameter first. A collective."""
        mine = self._reducer.first_non_finite
        found = torch.zeros(self._communicator.world_size, dtype=torch.float64)
        found[self._communicator.rank] = 0 if mine is None else mine + 1
        self._communicator.all_reduce(found).wait()
        rows = [
            f"rank {rank}, first in parameter '{self._reducer.parameter_name(int(index) - 1)}'"
            for rank, index in enumerate(found.tolist())
            if index
        ]
        if not rows:
            return "every rank's own gradients are finite, so their sum overflowed: lower the loss or use bf16"
        return "they come from " + "; ".join(rows)
