"""One backward of a model part: who takes part in it, and in which order they hear of it.

[Note: a backward]
| what happens                                       | who notices                | what follows                      |
|----------------------------------------------------|----------------------------|-----------------------------------|
| the first gradient of a parameter arrives          | the reducer                | `begins()`                        |
| all gradients of a unit are there                  | the reducer                | `reducing(unit)`                  |
| autograd reaches a block, and is past others       | the parameters' lifetimes  | `past(units)`                     |
| autograd is done, and trained nothing              | the parameters' lifetimes  | nothing, see `is_training`        |
| autograd is done, and the engine did not start it  | a hook on the outputs      | `finish()`, and with it `ended()` |
| autograd is done, and the engine started it        | `run()`                    | `finish()`, and with it `ended()` |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from partita.comm import Communicator
from partita.model.accumulation import Accumulation
from partita.model.loss_scaling import LossScaling
from partita.run import Run
from partita.units import (
    BackwardPlan,
    FlatParameters,
    GradientReducer,
    ModelUnits,
    ParameterLifetimes,
    ReductionSettings,
    Unit,
    accumulates,
)


class Backward:
    """Conducts the backwards of one model part, see [Note: a backward]. It is the reducer's `BackwardListener`, and the
    `BackwardConductor` of the lifetimes.

    A program may ask for gradients that train nothing: `autograd.grad(outputs, inputs)`. Parameters are brought for
    such a backward, but it begins none of ours, which all ranks would have to end.

    Backwards of different parts may be interleaved. Two backwards of the same part may not: the second begins when the
    first has ended.

    Args:
        gathering: carries parameters that are gathered while they compute; None where there are none.
        exits: closes what was made here.
    """

    def __init__(
        self,
        units: ModelUnits,
        run: Run,
        gathering: Communicator | None,
        scaling: LossScaling,
        accumulation: Accumulation,
        exits: ExitStack,
    ) -> None:
        zero = run.config.zero_optimization
        self.ended_count = 0
        self._scaling = scaling
        self._accumulation = accumulation
        self._overlaps = zero.overlap_comm
        self._end_is_queued = False
        self._is_running = False
        self.lifetimes = ParameterLifetimes(
            units.groups,
            gathering,
            prefetch_numel=zero.stage3_prefetch_bucket_size,
            max_live_numel=zero.stage3_max_live_parameters,
            conductor=self,
        )
        exits.callback(self.lifetimes.close)
        self.reducer = GradientReducer(
            units.trained,
            run.grid.data,
            run.policy,
            ReductionSettings(run.precision.communication, 1.0 / run.predivide, zero.overlap_comm),
            run.streams,
            listener=self,
        )
        exits.callback(self.reducer.close)

    # -- what others do

    def watch(self, outputs: Any) -> None:
        """Called with the outputs of a forward, of which a backward may start that nobody announces.

        A parameter's hook could run inside a reentrant checkpoint, whose end is not the end. So a hook on the outputs
        asks autograd for a call at the end of the whole backward.
        """
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._gradient_arrives)  # type: ignore[no-untyped-call]

    def run(self, roots: Sequence[Tensor], grads: Sequence[Tensor] | None, retain_graph: bool) -> None:
        """See `ModelPart.backward`."""
        before = self.ended_count
        self._is_running = True
        try:
            with self._scaling.scaled():
                if roots:
                    torch.autograd.backward(roots, grads, retain_graph=retain_graph)
                self.reducer.finish_backward()
                if self.ended_count == before:  # no gradient reached a parameter here, but some may on other ranks
                    self.reducer.reduce_zeros()
        finally:
            self._is_running = False
        self._end_is_queued = False

    def finish(self) -> None:
        """The backward under way is over, if there is one. A parameter without a gradient counts as one with zeros."""
        self.reducer.finish_backward()

    def forget(self) -> None:
        """The micro-batch is over, or given up."""
        self._end_is_queued = False
        self._scaling.forget()
        self.lifetimes.forget_forwards()

    # -- what the reducer and the lifetimes see

    def begins(self) -> BackwardPlan:
        """The first gradient of a backward has arrived."""
        self.lifetimes.begin_backward()
        return BackwardPlan(self._accumulation.reduces, self._scaling.missing())

    def may_reduce(self, unit: Unit) -> bool:
        """Whether the gradients of a unit may be reduced before the backward is over."""
        return self.lifetimes.may_reduce(unit)

    def reducing(self, unit: Unit) -> None:
        """The gradients of a unit are about to be reduced."""
        if self._overlaps:
            self.lifetimes.before_reduction(unit)
        else:
            self.lifetimes.gather_rest()

    @property
    def is_training(self) -> bool:
        """Whether the backward under way has brought gradients to parameters, or the engine started it."""
        return self._is_running or self.reducer.in_backward

    def past(self, units: Sequence[FlatParameters]) -> None:
        """These units get no gradient any more in this backward. If it trains, that is: it may have brought no gradient
        to a parameter yet."""
        if units and (self.is_training or accumulates(p for unit in self.reducer.units for p in unit.parameters)):
            self.reducer.no_more_gradients(units)

    def ended(self) -> None:
        """All reductions of the backward have been launched, but those of gradients that came too late."""
        self.ended_count += 1
        self.lifetimes.end_backward()

    def _gradient_arrives(self, _grad: Tensor) -> None:
        if not self._end_is_queued:
            self._end_is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._end_is_queued = False
        self._scaling.forget()
        self.finish()
