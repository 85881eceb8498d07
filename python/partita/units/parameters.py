"""The parameters of a unit, and noticing what others write into them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.device.memory import FreedMemory
from partita.units.absent import ShardRun, drop_holder, give_to, holder_of
from partita.units.layout import ShardSlice, Slot, UnitLayout
from partita.units.residence import Residence, Residency


class FlatParameters:
    """Parameters in one flat buffer. `residence` owns the memory; this class is the parameters' `Holder`.

    `params` is the full buffer, of which this rank owns the range `own`. `own_params` has the values of that range, in
    memory that lasts.

    [Note: versions]
    Autograd counts the writes into a parameter in `parameter._version`. `_versions` are the counts at the time when the
    values were last known, so a difference means that somebody wrote since. The engine's own writes go through the flat
    buffers, which do not share the count. Writes through `.data` are not counted;
    `Unit.adopt_written_parameters` looks for them now and then.
    """

    def __init__(self, residence: Residence) -> None:
        self.residence = residence
        self.layout: UnitLayout = residence.layout
        self.parameters: list[nn.Parameter] = residence.parameters
        self.dtype = residence.dtype
        self.own: range = residence.own
        self.communicator: Communicator = residence.communicator
        self._versions: list[int] = []
        self._versions_at_pin: list[int] = []
        self._committed: set[Slot] = set()  # since somebody looked
        self.brings: Callable[[], bool] | None = None  # what the lifetimes of the parameters do for `bring`
        # Called before others than an update write into the unit's values or states, as far as that is known before.
        self.before_write: Callable[[], object] = lambda: None

    @property
    def params(self) -> Tensor:
        """The full buffer, with or without memory."""
        return self.residence.params

    @property
    def own_params(self) -> Tensor:
        """The values of this rank's own range."""
        return self.residence.own_params

    def part(self, full: Tensor) -> Tensor:
        """This rank's own range of a full buffer, as a view."""
        return self.residence.part(full)

    def own_slices(self) -> list[ShardSlice]:
        """The parts of parameters that lie in this rank's own range, in order."""
        return self.residence.own_slices()

    def offsets(self) -> list[int]:
        """Where each parameter starts in the full buffer."""
        return [slot.offset for slot in self.layout.slots]

    def name_of(self, parameter: nn.Parameter) -> str:
        """The parameter's name in the model."""
        return next(s.name for s, p in zip(self.layout.slots, self.parameters, strict=True) if p is parameter)

    def take_parameters(self) -> None:
        """The parameters become views of the unit's memory, whose own range must have the values."""
        for parameter in self.parameters:
            parameter.grad = None
        self.residence.take()
        self._versions = self._current_versions()
        # Weak, as a model may outlive its engine: the parameters must not keep the unit's buffers alive.
        give_to(weakref.ref(self), self.parameters)

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Inside the block, this rank's own range may be written in memory: `own_params`, and what a unit keeps beside
        (`take_full_precision`, its states). A collective at both ends. The parameters follow with the end, unless an
        error leaves the block. What others have written into parameters is adopted before, or forgotten."""
        self.communicator.barrier()  # nobody computes with the old ones any more
        self.will_write()
        self.take_written()
        yield
        self._follow()
        self.communicator.barrier()

    def _follow(self) -> None:
        """What is made of what was written. A collective."""

    def settle(self) -> None:
        """No copy reads the unit's values in memory of the host any more, so that the host may write there. It waits.

        An update calls this before it writes; others call `will_write`.
        """
        self.residence.settle()

    def will_write(self) -> None:
        """Others than an update are about to write into the unit's values or states."""
        self.settle()
        self.before_write()

    def abandon(self) -> None:
        """The parameters have no holder any more, and those that come and go no values, see `Residence.abandon`."""
        own = [
            parameter for parameter in self.parameters if holder_of(parameter) is self
        ]  # not another engine's by now
        with suppress(RuntimeError):  # of a device that has failed: nobody copies any more
            self.settle()  # the memory may go with this
        self.residence.abandon(own)
        drop_holder(own)

    # -- for others than the model's forward and backward, see `Holder`

    def bring(self) -> bool:
        """Whether the parameters are here now, see `Holder`."""
        return self.brings is not None and self.brings()

    @contextmanager
    def whole(self) -> Iterator[Callable[[nn.Parameter], Tensor]]:
        """Values to be read only, see `Holder`."""
        if (values := self.residence.readable()) is not None:
            by_parameter = dict(zip(map(id, self.parameters), values, strict=True))
            yield lambda parameter: by_parameter[id(parameter)]
            return
        self.pin()
        try:
            yield lambda parameter: parameter.detach()
        finally:
            self.unpin()

    def pin(self) -> None:
        """The values are in memory that belongs to this rank alone, see `Holder`."""
        self.will_write()
        if not self.residence.is_pinned:
            self._versions_at_pin = self._current_versions()
        self.residence.pin()

    def unpin(self) -> None:
        """The reverse of `pin`, see `Holder`."""
        now = self._current_versions()
        self.residence.unpin()
        if self.residence.is_pinned or not self.residence.comes_and_goes:
            return
        # What was written while the unit was pinned is committed by now, or forgotten with the memory: the counts of
        # these writes are added to the known ones. What was written before the pin stays a difference. Parameters that
        # are always here forget nothing, so what was written to them stays a difference, too.
        since = zip(self._versions, now, self._versions_at_pin, strict=True)
        self._versions = [known + after - before for known, after, before in since]

    def commit(self, parameters: list[nn.Parameter]) -> None:
        """What was written becomes the values, see `Holder`."""
        self.residence.commit(parameters)
        self._note_committed(parameters)

    def _note_committed(self, parameters: list[nn.Parameter]) -> None:
        committed = set(map(id, parameters))
        slots = zip(self.layout.slots, self.parameters, strict=True)
        self._committed |= {slot for slot, parameter in slots if id(parameter) in committed}

    def shard_runs(self, parameters: list[nn.Parameter]) -> list[ShardRun] | None:
        """This rank's part of these parameters, see `Holder`."""
        if self.residence.comes_and_goes and self.residence.state is not Residency.ABSENT:
            return None  # what is here would keep the old values
        shard = self.layout.shard_range(self.communicator.rank)
        memory = self.own_params if self.residence.comes_and_goes else self.params[shard.start : shard.stop]
        wanted = set(map(id, parameters))
        by_slot = dict(zip(self.layout.slots, self.parameters, strict=True))
        slices = [s for s in self.layout.slices(shard) if id(by_slot[s.slot]) in wanted]
        return [ShardRun(by_slot[s.slot], s.parameter_offset, memory[s.in_shard]) for s in slices]

    @contextmanager
    def writing_shards(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside the block, each rank writes its `shard_runs`, see `Holder`."""
        self.communicator.barrier()  # nobody computes with the old ones any more
        self.will_write()
        yield
        if self.residence.comes_and_goes:
            self._note_committed(parameters)
        else:
            self.communicator.all_gather(self.params).wait()
            torch.autograd.graph.increment_version(parameters)
        self.communicator.barrier()

    # -- noticing

    def check_parameters_in_place(self) -> None:
        """Raises RuntimeError when a parameter's memory was replaced, so that updates would no longer reach it."""
        moved = next(self.residence.moved(), None)
        if moved is not None:
            raise RuntimeError(
                f"the memory of parameter '{moved.name}' was replaced after initialize() (by .to(), .half(), .data = "
                "... or the like), so training no longer reaches it: convert the model before initialize(), and write "
                "into a parameter with copy_() under torch.no_grad()"
            )

    def check_unwritten(self) -> None:
        """Raises RuntimeError when a parameter that comes and goes was written to, as other ranks do not know."""
        if not self.residence.comes_and_goes:
            return
        written = next(iter(self._written_slots()), None)
        if written is not None:
            raise RuntimeError(
                f"parameter '{written.name}' was written to while it was gathered (ZeRO stage 3), which reaches its "
                "shards on no rank or on some: write inside `with partita.zero.GatheredParameters(parameters, "
                "modifier_rank=0)`; a module that changes its own parameters in forward needs stage 0, 1 or 2"
            )

    def first_written(self) -> str | None:
        """A parameter that is always here and was written by others since the last step, as far as that is counted."""
        return None if self.residence.comes_and_goes else next((s.name for s in self._written_slots()), None)

    def take_written(self) -> set[Slot]:
        """The parameters that were written or committed since the last call, by others than the engine."""
        written = {*self._committed, *self._written_slots()}
        if written:
            self.will_write()
            self._versions, self._committed = self._current_versions(), set()
        return written

    def _written_slots(self) -> list[Slot]:
        versions = self._current_versions()
        if versions == self._versions:  # almost always
            return []
        slots = zip(self.layout.slots, versions, self._versions, strict=True)
        return [slot for slot, now, known in slots if now != known]

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters]


def full_values(parameter: nn.Parameter) -> Tensor:
    """A copy of all values of a parameter: also of one that is partitioned, when all ranks ask together."""
    holder = holder_of(parameter)
    if holder is None:
        return parameter.detach().clone(memory_format=torch.contiguous_format)
    with holder.whole() as values_of:
        return values_of(parameter).clone(memory_format=torch.contiguous_format)


def fill_from_rank_0(
    destination: Tensor,
    layout: UnitLayout,
    elements: range,
    parameters: list[nn.Parameter],
    communicator: Communicator,
) -> None:
    """Copies the values that parameters have on rank 0, as far as they lie in a range of a layout; one at a time."""
    parts = {part.slot: part for part in layout.slices(elements)}
    freed = FreedMemory()
    for slot, parameter in zip(layout.slots, parameters, strict=True):
        values = full_values(parameter)
        communicator.broadcast(values, 0).wait()
        if (part := parts.get(slot)) is not None:
            destination[part.in_shard] = values.view(-1)[part.in_parameter]
        freed.add(values.nbytes, values.device)
