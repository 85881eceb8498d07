"""Ends a run whose steps are all skipped, and says where the non-finite gradients come from."""

from __future__ import annotations

import torch
from torch import Tensor

from partita._core import LossScaler, LossScaleState
from partita.comm import Communicator
from partita.units import GradientReducer


class SkipGuard:
    """Counts on the loss scale's state, which is the same on every rank, so all ranks raise together.

    Reduced gradients no longer tell which rank they come from, so if one more skipped step would end the run, the
    reducer is asked to look at every gradient before it is reduced.

    Args:
        limit: skipped steps in a row that end a run. Overflowing at the smallest loss scale ends it at once.
        lag: steps whose gradients are on their way when the outcome of one is learned.
    """

    def __init__(
        self,
        scaler: LossScaler,
        reducer: GradientReducer,
        communicator: Communicator,
        *,
        limit: int,
        lag: int,
    ) -> None:
        self._scaler = scaler
        self._reducer = reducer
        self._communicator = communicator
        self._limit = limit
        self._lag = lag
        self._look_ahead(scaler.initial())

    def check(self, step: int, state: LossScaleState, finiteness: list[tuple[int, Tensor]]) -> None:
        """Called with the outcome of every optimizer step, and what the reducer saw of its gradients.

        Raises:
            FloatingPointError: the limit or the minimum scale is reached; names ranks and parameters.
        """
        if state.at_minimum:
            what = f"the loss scale is at its minimum, {state.scale:g}, and gradients still overflow"
        elif state.consecutive_skips >= self._limit:
            what = f"{state.consecutive_skips} steps in a row were skipped because gradients are not finite"
        else:
            self._look_ahead(state)
            return
        raise FloatingPointError(f"training stopped at step {step}: {what}; {self._origin(finiteness)}")

    def _look_ahead(self, state: LossScaleState) -> None:
        coming = [self._scaler.after_overflows(state, n) for n in range(1, self._lag + 2)]
        self._reducer.watches_finiteness = any(s.at_minimum or s.consecutive_skips >= self._limit for s in coming)

    def _origin(self, finiteness: list[tuple[int, Tensor]]) -> str:
        """Which ranks made non-finite gradients, and in which parameter first. A collective."""
        mine = next((parameter for parameter, is_finite in finiteness if not is_finite), None)
        found = torch.zeros(self._communicator.world_size, dtype=torch.float64, device=self._communicator.device)
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
