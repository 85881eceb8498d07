"""Ends a run whose steps are all skipped, and says where the non-finite gradients come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from partita._core import LossScaler, LossScaleState
from partita.comm import Communicator, text_by_rank
from partita.units import GradientReducer

Finiteness = list[tuple[str, Tensor]]  # name of a parameter, whether all elements of its gradient are finite


class SkipGuard:
    """Counts on the loss scale's state, which is the same on every rank, so all ranks raise together.

    Reduced gradients no longer tell which rank they come from. So if one more skipped step would end the run, the
    reducers are asked to look at every gradient before it is reduced.

    Args:
        world: the ranks whose gradients decide about a step.
        scales_loss: whether losses are multiplied by the loss scale.
        limit: skipped steps in a row that end a run. Overflowing at the smallest loss scale ends it at once.
        lag: steps whose gradients are on their way when the outcome of one is learned.
    """

    def __init__(
        self,
        scaler: LossScaler,
        reducers: Sequence[GradientReducer],
        world: Communicator,
        *,
        scales_loss: bool,
        limit: int,
        lag: int,
    ) -> None:
        self._scaler = scaler
        self._reducers = reducers
        self._world = world
        self._scales_loss = scales_loss
        self._limit = limit
        self._lag = lag
        self.look_ahead(scaler.initial())

    def check(self, step: int, state: LossScaleState, finiteness: Finiteness) -> None:
        """Called with the outcome of every optimizer step, and what the reducers saw of its gradients.

        Raises:
            FloatingPointError: the limit or the minimum scale is reached; names ranks and parameters.
        """
        if state.at_minimum:
            what = f"the loss scale is at its minimum, {state.scale:g}, and gradients still overflow"
        elif state.consecutive_skips >= self._limit:
            what = f"{state.consecutive_skips} steps in a row were skipped because gradients are not finite"
        else:
            self.look_ahead(state)
            return
        raise FloatingPointError(f"training stopped at step {step}: {what}; {self._origin(finiteness)}")

    def look_ahead(self, state: LossScaleState) -> None:
        """From this state on: gradients are looked at if a step whose gradients are to come could end the run."""
        coming = [self._scaler.after_overflows(state, n) for n in range(1, self._lag + 2)]
        watches = any(s.at_minimum or s.consecutive_skips >= self._limit for s in coming)
        for reducer in self._reducers:
            reducer.packing.watches_finiteness = watches

    def _origin(self, finiteness: Finiteness) -> str:
        """Which ranks made non-finite gradients, and in which parameter first. A collective."""
        mine = next((name for name, is_finite in finiteness if not is_finite), "")
        rows = [
            f"rank {rank}, first in parameter '{name}'"
            for rank, name in enumerate(text_by_rank(self._world, mine))
            if name
        ]
        if not rows:
            instead = "use bf16, whose range is that of fp32" if self._scales_loss else "lower the learning rate"
            return f"every rank's own gradients are finite, so their sum overflowed: {instead}"
        return (
            f"they come from {'; '.join(rows)}: look at the loss and the batch there "
            "(torch.autograd.set_detect_anomaly(True) names the operation), or lower the learning rate"
        )
