"""Everything that must survive a restart, in one list.

[Note: training state]
A `Section` is a small state that belongs to the run as a whole: counters, hyper-parameters, a schedule, a position,
random states. A `Quantity` is one value per element of a unit: its fp32 weights, and what the optimizer keeps for each
element. A rank has its own range of every unit. What the model has beside its units, buffers and frozen parameters, are
`tensors`.

The fp32 weights are all there is to a trained parameter: a 16-bit parameter is its master rounded, and the remainder of
a split master is what the parameter lacks of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from partita.comm import Communicator, ProcessGrid, raise_together
from partita.model.part import ModelPart
from partita.model.plain import from_plain, to_plain
from partita.units import FlatParameters, ShardSlice, Unit

WEIGHT = "weight"

# Does on each rank what may be refused there; if it is on any, all raise.
Agree = Callable[[Callable[[], None]], object]


class Stateful(Protocol):
    """Has a small state: numbers, strings, small tensors, and lists, tuples and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Takes a state."""


@runtime_checkable
class KeepsValues(Stateful, Protocol):
    """Has a value per element beside its small state: an optimizer."""

    def values_of(self, state: dict[str, Any]) -> set[tuple[str, str]]:
        """(parameter, quantity) of the values that this rank has once `state` has been loaded.

        Raises:
            ValueError: the state is of other parameters.
        """

    def keeping(self, state: dict[str, Any] | None, names: Collection[str], applied: int) -> dict[str, Any] | None:
        """`state` (None: nothing is loaded), made such that these parameters go on with what they have now in a run
        that has applied so many steps."""


@runtime_checkable
class DiffersByRank(Stateful, Protocol):
    """Each rank has a state of its own."""

    def from_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """The state that this rank loads.

        Args:
            states: of all ranks of the run that saved them. Their number, and what each had, may differ from here.
            rank, world_size: of this process.
        """


@dataclass(frozen=True)
class Section:
    """A small state by name. The states of an owner that is `DiffersByRank` differ from rank to rank."""

    name: str
    owner: Stateful


class CommonAccumulation:
    """The micro-batches of a model, which all of its parts have seen. The parts of ranks differ in number."""

    def __init__(self, of_parts: Sequence[Stateful]) -> None:
        self._of_parts = of_parts

    def state_dict(self) -> dict[str, Any]:
        """That of the first part."""
        return self._of_parts[0].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All parts take it."""
        for one in self._of_parts:
            one.load_state_dict(state)


@dataclass(frozen=True)
class Quantity:
    """One value per element of this rank's own range of a unit.

    slices: the parts of parameters that have it.
    """

    name: str
    unit: FlatParameters
    slices: list[ShardSlice]

    def read(self) -> Tensor:
        """The values, flat; those of split masters are a copy."""
        if not isinstance(self.unit, Unit):
            return self.unit.own_params
        return self.unit.full_precision() if self.name == WEIGHT else self.unit.states[self.name]

    def stored(self) -> dict[str, Tensor]:
        """How the values are kept, nothing converted: by name, weights as `Unit.stored_weights` has them."""
        if self.name != WEIGHT:
            return {self.name: self.read()}
        return self.unit.stored_weights() if isinstance(self.unit, Unit) else {"": self.unit.own_params}

    def take(self, part: slice, values: Tensor) -> None:
        """Takes values of a part of `read()`, of any dtype and device, while the unit is `rewriting`."""
        if not isinstance(self.unit, Unit):
            self.unit.own_params[part].copy_(values)
        elif self.name == WEIGHT:
            self.unit.take_full_precision(part, values)
        else:
            self.unit.states[self.name][part].copy_(values)


@dataclass(frozen=True)
class Snapshot:
    """A training state of one rank in memory of its own.

    sections: by name, as JSON has them. values: by parameter and quantity, this rank's part, flat. tensors: by name.
    """

    sections: dict[str, Any]
    values: dict[tuple[str, str], Tensor]
    tensors: dict[str, Tensor]


class TrainState:
    """What a training run consists of, see [Note: training state].

    In a pipeline a rank has the parts of its own stages, and the ranks of `grid.data` have the same parts.

    Args:
        parts: of the model, those of this rank.
        sections: small states, in the order in which they are loaded.
        grid: the ranks that go on together.

    Attributes:
        is_torn: an error came while values were written: some are those of before, and some are not.

    Raises:
        ValueError: two parts have a parameter of the same name.
    """

    def __init__(self, parts: Sequence[ModelPart], sections: Sequence[Section], grid: ProcessGrid) -> None:
        self.sections = list(sections)
        self._parts = parts
        self._grid = grid
        self.is_torn = False
        names = Counter(
            slot.name for part in parts for flat in (*part.units, *part.frozen) for slot in flat.layout.slots
        )
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two parts of the model have a parameter '{twice}': their states would be mixed up")

    def quantities(self) -> Iterator[Quantity]:
        """Every quantity of every unit. Those of a torch optimizer are there once it has taken a step, or when its
        section has been loaded."""
        for part in self._parts:
            for unit in part.units:
                yield Quantity(WEIGHT, unit, unit.own_slices())
                for name, flat in unit.states.items():
                    memory = flat.untyped_storage()._cdata
                    slots = {
                        slot
                        for kept in unit.kept.values()
                        for slot, piece in kept.items()
                        if piece.untyped_storage()._cdata == memory
                    }
                    yield Quantity(name, unit, [s for s in unit.own_slices() if s.slot in slots])
            for flat_parameters in part.frozen:
                yield Quantity(WEIGHT, flat_parameters, flat_parameters.own_slices())

    def tensors(self) -> dict[str, Tensor]:
        """Buffers, and parameters that are not trained and not partitioned, by name."""
        return {**self.untrained(), **self.buffers()}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        shapes = {name: tuple(p.shape) for part in self._parts for name, p in part.untrained.items()}
        for part in self._parts:
            shapes.update((slot.name, slot.shape) for flat in (*part.units, *part.frozen) for slot in flat.layout.slots)
        return shapes

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that the engine took, by the name that it had then."""
        found = {name: p for part in self._parts for name, p in part.untrained.items()}
        for flat in (flat for part in self._parts for flat in (*part.units, *part.frozen)):
            found.update((slot.name, p) for slot, p in zip(flat.layout.slots, flat.parameters, strict=True))
        return found

    def untrained(self) -> dict[str, Tensor]:
        """Parameters that are not trained and not partitioned, by name; the same values on all ranks of `data`."""
        found: dict[str, Tensor] = {}
        for part in self._parts:
            partitioned = {p for flat in part.frozen for p in flat.parameters}
            found.update((n, p.detach()) for n, p in part.untrained.items() if p not in partitioned)
        return found

    def frozen(self) -> set[str]:
        """Names of the parameters that are not trained, partitioned or not."""
        return {name for part in self._parts for name in part.untrained}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name, also those that a state dict leaves out."""
        return {name: buffer for part in self._parts for name, buffer in part.module.named_buffers()}

    def replicas(self) -> dict[str, str]:
        """Tensors that are kept by another part: name here -> name there. Both have the same values."""
        return {name: owner for part in self._parts for name, owner in part.replicas.items()}

    @property
    def modules(self) -> list[nn.Module]:
        """Of the parts."""
        return [part.module for part in self._parts]

    @property
    def world(self) -> Communicator:
        """The ranks that go on together."""
        return self._grid.world

    @property
    def data(self) -> Communicator:
        """The ranks that have the same parts."""
        return self._grid.data

    @property
    def pipe(self) -> Communicator:
        """Ranks that have all parts of the model together."""
        return self._grid.pipe

    @torch.no_grad()
    def take_sections(self) -> dict[str, Any]:
        """The small states by name, as JSON has them. Writes into parameters that were counted count, and ranks share
        their buffers. A collective.

        Raises:
            RuntimeError: in the midst of a step, whose gradients are no part of the state.
            TypeError, ValueError: a section has something that cannot be saved; names it.
        """
        sections: dict[str, Any] = {}

        def take_sections() -> None:
            self._require_idle("its training state is taken")
            sections.update((s.name, to_plain(s.owner.state_dict(), s.name)) for s in self.sections)

        self._agree(take_sections)
        for part in self._parts:
            part.share_buffers()
        return sections

    @torch.no_grad()
    def copy(self) -> Snapshot:
        """The state as it is between two steps. A collective.

        Raises:
            RuntimeError: in the midst of a step, whose gradients are no part of the state.
            TypeError, ValueError: a section has something that cannot be saved; names it.
        """
        sections = self.take_sections()
        self.adopt_written_parameters()
        values = {}
        for quantity in self.quantities():
            flat = quantity.read()
            for s in quantity.slices:
                values[s.slot.name, quantity.name] = flat[s.in_shard].clone()
        return Snapshot(sections, values, {name: tensor.clone() for name, tensor in self.tensors().items()})

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Takes a state of a run with the same ranks, stage and model. A collective.

        Raises:
            ValueError: the state lacks something that this run has, or the other way round; names it.
        """
        self.require_idle("a training state is loaded")
        self._agree(partial(self._require_all, snapshot))
        states = {name: from_plain(state) for name, state in snapshot.sections.items()}
        self.load_sections(states)
        with self.rewriting():
            for quantity in self.quantities():
                for s in quantity.slices:
                    quantity.take(s.in_shard, snapshot.values[s.slot.name, quantity.name])
            for name, tensor in self.tensors().items():
                tensor.copy_(snapshot.tensors[name])

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Inside the block, values may be written (`Quantity.take`). A collective at both ends."""
        self.is_torn = True
        with ExitStack() as units:
            for part in self._parts:
                for flat in (*part.units, *part.frozen):
                    units.enter_context(flat.rewriting())
            yield
        self.is_torn = False

    def adopt_written_parameters(self) -> None:
        """All that was written into parameters counts, also what nothing counted: all are compared. No collective."""
        for part in self._parts:
            part.adopt_written_parameters()

    def require_idle(self, when: str) -> None:
        """Between two steps; writes into parameters that were counted count. A collective.

        Args:
            when: for the error.

        Raises:
            RuntimeError: in the midst of a step.
        """
        self._agree(partial(self._require_idle, when))

    def load_sections(self, states: Mapping[str, dict[str, Any]], agree: Agree | None = None) -> None:
        """Sections take these states, all or none: a section may refuse what it is given, on one rank alone. Sections
        without a state stay. A collective.

        Args:
            agree: does what may be refused on one rank, and then raises on all; None: all raise errors of one kind.

        Raises:
            ValueError: a section refuses its state; nothing has changed on any rank then. Or what `agree` raises.
        """
        agree = agree or self._agree
        given = [section for section in self.sections if section.name in states]
        keepers = [section for section in given if isinstance(section.owner, KeepsValues)]
        small = [section for section in given if not isinstance(section.owner, KeepsValues)]
        before: list[tuple[Section, Any]] = []

        def look() -> None:
            for section in keepers:
                if isinstance(section.owner, KeepsValues):
                    section.owner.values_of(states[section.name])  # which refuses
            before.extend((section, to_plain(section.owner.state_dict(), section.name)) for section in small)

        def load(sections: Sequence[Section]) -> None:
            for section in sections:
                section.owner.load_state_dict(states[section.name])

        agree(look)
        try:
            agree(partial(load, small))
            agree(partial(load, keepers))  # they come last: what they had is not kept here
        except Exception:  # on all ranks
            for section, state in before:
                section.owner.load_state_dict(from_plain(state))
            raise

    def _agree(self, step: Callable[[], None]) -> None:
        """Does what may be refused on one rank; all ranks raise together."""
        error: Exception | None = None
        try:
            step()
        except Exception as refused:
            error = refused
        raise_together(self._grid.world, error)

    def _require_idle(self, when: str) -> None:
        for part in self._parts:
            part.require_no_gradients(when)
        for part in self._parts:
            part.rest()
            part.gathers.wait()
            part.adopt_written_parameters(looks=False)

    def _require_all(self, snapshot: Snapshot) -> None:
        """Refuses what does not fit, while nothing has been loaded."""
        _require_equal("section", {section.name for section in self.sections}, snapshot.sections)
        here = {(s.slot.name, q.name) for q in self.quantities() if q.name == WEIGHT for s in q.slices}
        for section in self.sections:
            if isinstance(section.owner, KeepsValues):
                here |= section.owner.values_of(from_plain(snapshot.sections[section.name]))
        _require_equal("value", {f"{q} of {p}" for p, q in here}, {f"{q} of {p}" for p, q in snapshot.values})
        _require_equal("tensor", set(self.tensors()), snapshot.tensors)


def _require_equal(what: str, here: set[str], saved: Iterable[str]) -> None:
    there = set(saved)
    if here - there:
        raise ValueError(f"the training state has no {what} '{min(here - there)}', which this run needs")
    if there - here:
        raise ValueError(f"the training state has a {what} '{min(there - here)}', which this run does not have")
