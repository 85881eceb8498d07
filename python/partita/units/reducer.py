"""Gradients from autograd into flat buffers, and reduced over ranks while backward goes on.

[Note: streams]
Gradients are packed on the stream that is current when their unit is complete, after waiting for the other streams
that made some of them, and for the stream that the reducer used last: its buffers are used again. The collective is
queued behind that on a stream of the transport's, so backward goes on beside it; waiting for its handle makes the
current stream wait, not the host.

[Note: several backwards]
A unit's first reduction of a step happens in its own full buffer where it has one. When more gradients come
before the step (a second backward, stage 2's micro-batches), they are reduced in a staging buffer and added to
the result: sums are linear, so every backward counts, whenever it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from partita._core import Bucketer
from partita.comm import Communicator, any_rank_each
from partita.device.memory import FreedMemory
from partita.device.streams import InOrder, Streams
from partita.units.in_flight import Reductions
from partita.units.packing import Packing
from partita.units.parameters import FlatParameters
from partita.units.policy import StagePolicy
from partita.units.reduction import BackwardListener, BackwardPlan, ReductionSettings
from partita.units.taken import TakenGradients, fresh
from partita.units.unit import GradState, Unit
from partita.units.watch import watch


class GradientReducer:
    """Watches the parameters of the units; see `Bucketer` for when a unit is launched.

    Args:
        units: in launch order.
        communicator: of the data-parallel ranks.
        listener: hears of every backward that the reducer sees, see `BackwardListener`.
    """

    def __init__(
        self,
        units: list[Unit],
        communicator: Communicator,
        policy: StagePolicy,
        settings: ReductionSettings,
        streams: Streams,
        listener: BackwardListener,
    ) -> None:
        self.units = units
        self._communicator = communicator
        self._policy = policy
        self._settings = settings
        self._streams = streams
        self._order = InOrder(streams)  # its buffers are used again
        self._listener = listener
        self._first_backward = True
        self._plan = BackwardPlan(reduces=False)  # of the backward under way
        self._next = 0  # the unit that is launched next in it
        self._reductions = Reductions(communicator, policy, settings, streams, units, self._order)
        self.packing = Packing(units, settings.grad_factor, streams)
        self._names = [slot.name for unit in units for slot in unit.layout.slots]
        self._unit_of = [i for i, unit in enumerate(units) for _ in unit.parameters]
        self._first_parameter = [self._unit_of.index(i) for i in range(len(units))]
        self._bucketer = Bucketer(self._unit_of, len(units))
        self._index_of = {id(p): i for i, p in enumerate(p for unit in units for p in unit.parameters)}
        self._taken = TakenGradients(units)
        self._has_committed = False  # gradients of micro-batches that are over
        self._hooks = [
            watch(parameter, self, i) for i, parameter in enumerate(p for unit in units for p in unit.parameters)
        ]

    @property
    def in_backward(self) -> bool:
        """Whether gradients have arrived of a backward that is not finished."""
        return self._bucketer.in_backward

    @property
    def has_gradients(self) -> bool:
        """Whether there are gradients of the step at hand, also such that are being reduced."""
        return bool(self._reductions) or any(unit.grad_state is not GradState.EMPTY for unit in self.units)

    @property
    def staging_bytes(self) -> int:
        """Of buffers that gradients of several units use in turns."""
        return self._reductions.staging_bytes

    @property
    def landing_bytes(self) -> int:
        """The same on the host."""
        return self._reductions.landing_bytes

    def finish_backward(self) -> None:
        """Backward is over: packs and launches what is left; parameters without a gradient count as zeros."""
        if not self._bucketer.in_backward:
            return
        self._bucketer.finish()
        self._launch_up_to(len(self.units), at_end=True)
        self._listener.ended()
        if self._first_backward:
            self._first_backward = False
            if self._settings.overlap:
                self._launch_late()
            FreedMemory().give_back()  # of building the model, and of what backward needs only once

    @torch.no_grad()
    def _launch_late(self) -> None:
        """Reduces what arrived after its unit was launched; on all ranks, if on any. See `Bucketer`."""
        late = [any(fresh(p) is not None for p in unit.parameters) for unit in self.units]
        if self._plan.reduces or not self._policy.keeps_full_grads:
            late = any_rank_each(self._communicator, late)
        for i, is_late in enumerate(late):
            if is_late:
                self._reductions.finish()  # the first one of this unit may be under way in the buffer of this one
                self._launch(i)

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Adds what a backward has left of a parameter's gradient to the micro-batches that are summed on this rank.

        Args:
            gradient: of the parameter's shape, in any dtype of the core's; it carries the loss scale.

        Raises:
            ValueError: not a parameter of this reducer's, or another shape.
            RuntimeError: there is no such sum: before a backward, after the reduction, or in stages 2 and 3.
        """
        if (index := self._index_of.get(id(parameter))) is None or gradient.shape != parameter.shape:
            name = "of another model" if index is None else f"'{self._names[index]}' of shape {tuple(parameter.shape)}"
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} was given for parameter {name}")
        unit, slot = self.units[u := self._unit_of[index]], index - self._first_parameter[u]
        is_open = unit.grad_state is GradState.LOCAL and not self._reductions.has(unit)
        if unit.full_grads is None or not is_open or self._bucketer.in_backward:
            raise _no_sum_to_add_to(self._names[index], unit, is_open, self._policy)
        self._order.enter()
        self.packing.add(u, slot, gradient, unit.full_grads)

    def reduce_zeros(self) -> None:
        """A backward without any gradient on this rank: the others wait for its part in their collectives."""
        self.begin_backward()
        self.finish_backward()

    def reduce_all(self) -> None:
        """Returns when `Unit.reduced` holds the sum over ranks of all gradients since the last reset."""
        self.finish_backward()
        self._order.enter()
        self.wait()
        self.reduce_local()  # accumulated in backwards that did not reduce, and no boundary came after them
        self.wait()

    def reduce_local(self) -> None:
        """Begins to reduce what has accumulated on this rank. No reduction is under way."""
        self._order.enter()
        for unit in self.units:
            if unit.grad_state is GradState.LOCAL and unit.full_grads is not None:
                self._reductions.start_local(unit, unit.full_grads)

    def wait(self) -> None:
        """Returns when no reduction is under way."""
        self._reductions.wait()

    def reset(self) -> None:
        """Forgets all gradients, those of an unfinished backward too."""
        self._forget_sums()
        self._taken.clear()

    def _forget_sums(self) -> None:
        self.wait()
        if self._bucketer.in_backward:
            self._bucketer.finish()
        for unit in self.units:
            unit.grad_state = GradState.EMPTY
        self._has_committed = False
        self.packing.forget()

    def heed(self) -> bool:
        """Gradients that the program has dropped since the last call are gone; raises if that cannot be done. Returns
        whether nothing is left of the micro-batch: then a backward that an exception has ended is forgotten, too."""
        is_empty, dropped = self._taken.decide(self.in_backward, self._has_committed)
        if is_empty and self._has_committed:
            self._bucketer.finish()
        elif is_empty:
            self._forget_sums()
            self._taken.withdraw()
        elif dropped:
            self.wait()
            self._order.enter()
        for i, slot in dropped:
            self.units[i].drop_gradient(slot)
        return is_empty

    def take_written(self) -> None:
        """Gradients that the program has written count, as those of a backward of their own."""
        if not self._bucketer.in_backward and self._taken.has_fresh:
            self.reduce_zeros()

    def commit(self) -> None:
        """A micro-batch is over: dropping gradients does not concern its own."""
        self._taken.withdraw()
        self._has_committed = self.has_gradients

    def close(self) -> None:
        """Stops watching the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._taken.withdraw()
        with suppress(RuntimeError):  # of a collective that failed: nobody wants its result any more
            self.wait()

    def begin_backward(self) -> None:
        """Gradients are about to arrive; called by the first of them if by nobody else."""
        self.heed()
        self._taken.withdraw()
        self._reductions.wait_for_host()  # what was on its way to the host during the last micro-batch
        self._reductions.finish()  # gradients of another backward may be under way in the buffers that this one writes
        self._plan = self._listener.begins()
        self._next = 0
        self._bucketer.begin_backward(self._settings.overlap)

    def accumulated(self, index: int, parameter: nn.Parameter) -> None:
        """The gradient of a parameter, by its place in the launch order, is complete."""
        if not self._bucketer.in_backward:
            self.begin_backward()
        self._taken.receive(self._unit_of[index], parameter)
        try:
            _, end = self._bucketer.mark_ready(index)
        except RuntimeError as error:
            raise _fired_too_often(self._names[index]) from error
        self.packing.produced(self._unit_of[index])
        if self._next < end:
            self._launch_up_to(end)
        elif self._bucketer.is_complete(index) and not self._bucketer.was_launched(index):
            self._collect(self._unit_of[index])

    def no_more_gradients(self, units: Iterable[FlatParameters]) -> None:
        """What these units lack in this backward counts as zeros from now on, not only at its end."""
        if not self._bucketer.in_backward:
            self.begin_backward()
        index_of = {id(unit): i for i, unit in enumerate(self.units)}
        for i in sorted(index_of[id(unit)] for unit in units if id(unit) in index_of):
            first = self._first_parameter[i]
            for p, parameter in enumerate(self.units[i].parameters, start=first):
                if fresh(parameter) is None and not self._bucketer.is_complete(p):
                    self.accumulated(p, parameter)

    @torch.no_grad()
    def _launch_up_to(self, end: int, *, at_end: bool = False) -> None:
        """Launches the complete units before `end`, one after the other, as far as the listener lets them go."""
        while self._next < end and (at_end or self._listener.may_reduce(self.units[self._next])):
            self._next += 1
            self._launch(self._next - 1)

    @torch.no_grad()
    def _collect(self, index: int) -> None:
        """Takes the gradients of a unit whose turn has not come, so that they do not exist beside its full buffer."""
        unit = self.units[index]
        if unit.full_grads is None or unit.grad_state is GradState.REDUCED:
            return
        accumulate = unit.grad_state is GradState.LOCAL
        if not accumulate or any(fresh(p) is not None for p in unit.parameters):
            self._pack(index, unit.full_grads, accumulate=accumulate)
            unit.grad_state = GradState.LOCAL
        else:
            self._taken.show(index)

    def _launch(self, index: int) -> None:
        unit = self.units[index]
        self._listener.reducing(unit)
        if unit.full_grads is not None and unit.grad_state is not GradState.REDUCED:
            self._collect(index)
            if self._plan.reduces:
                self._reductions.start_local(unit, unit.full_grads)
        else:
            self._reductions.start_staged(unit, partial(self._pack, index, accumulate=False))

    def _pack(self, index: int, buffer: Tensor, *, accumulate: bool) -> None:
        """Moves the gradients of a unit into a full buffer; autograd's own tensors are released."""
        self._order.enter()
        self.packing.pack(index, buffer, factor=self._plan.factor, accumulate=accumulate)
        self._taken.show(index)  # which frees autograd's own tensors


def _fired_too_often(name: str) -> RuntimeError:
    return RuntimeError(
        f"parameter '{name}' received another gradient after its unit was reduced: it takes part in more reentrant "
        "checkpoints in this backward than in any before; set zero_optimization.overlap_comm to false, or use "
        "checkpoint(use_reentrant=False)"
    )


def _no_sum_to_add_to(name: str, unit: Unit, is_open: bool, policy: StagePolicy) -> RuntimeError:
    if unit.full_grads is None:
        reason = f"stage {policy.stage} keeps no sum on this rank: use stage 0 or 1"
    elif not is_open:
        reason = f"its unit holds {unit.grad_state.value}: add it after its backward and before the reduction"
    else:
        reason = "another backward is under way: add it when that has ended"
    return RuntimeError(f"a gradient that a backward has left was given for parameter '{name}', but {reason}")
