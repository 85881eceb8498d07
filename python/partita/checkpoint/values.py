"""Values of a checkpoint on their way into a training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.fit import Fit
from partita.checkpoint.names import StoredNames
from partita.checkpoint.places import MODEL, REMAINDER, RESERVED, Place, of_quantity
from partita.checkpoint.saved_state import SavedState
from partita.checkpoint.stored import Stored
from partita.device import HOST, flat_buffer, kernels
from partita.model import WEIGHT, Quantity, TrainState
from partita.units import ShardSlice, Unit

HALVES = (torch.float16, torch.bfloat16)
FULL = (torch.float32, torch.float64)
SPLIT = (torch.bfloat16, torch.int16)


class ValueReader:
    """Reads what this rank has, and beside that the rest of the chunks in which it begins and ends, twice: `check()`
    compares everything with its digests and keeps nothing, then `take()` reads into the training state, and compares
    again. So a damaged checkpoint changes nothing, and no memory is needed for it.

    Attributes:
        bytes_read: so far.
        fit: how the names of the model, those of all ranks, and of the checkpoint go together.
        rounded: parameters of this rank that take a 16-bit value in place of an fp32 weight, which the checkpoint has
            of others.

    Raises:
        CheckpointError: names or shapes of the model's tensors differ (`strict`; lists them), or nothing fits.
    """

    def __init__(self, state: TrainState, names: StoredNames, stored: Stored, saved: SavedState, strict: bool) -> None:
        self._state = state
        self._names = names
        self._stored = stored
        self._strict = strict
        self.bytes_read = 0
        kept = set(names.parameters.values())
        parameters = {place: spec.shape for place, spec in names.specs.items() if place in kept}
        buffers = {place: spec.shape for place, spec in names.specs.items() if place not in kept}
        self.fit = Fit(
            parameters, buffers, {p: t.shape for p, t in stored.tensors.items()}, saved.aliases, names.aliases
        )
        if strict:
            self.fit.require_all()
        self.fit.require_any()
        has_masters = (WEIGHT + "/", REMAINDER + "/")
        self._has_masters = any(p.stem != MODEL and p.name.startswith(has_masters) for p in stored.tensors)
        self.rounded: list[str] = []
        self._kept: set[tuple[str, str]] = set()  # (parameter, quantity) of what the optimizer takes
        self._joined = torch.empty(0, dtype=torch.float32, device=HOST)

    @property
    def parameters(self) -> list[str]:
        """Of this rank."""
        return list(self._state.parameter_shapes())

    def names_before(self, saved: SavedState) -> dict[str, str]:
        """The names of parameters of this rank, with those that they had in the model that was saved. Without those
        that the checkpoint does not have."""
        there = {stored: name for name, stored in saved.parameters.items()}
        stored = {name: self._source(name).name for name in self.parameters if self._has(name)}
        return {name: there.get(source, source) for name, source in stored.items()}

    def unused_states(self) -> list[str]:
        """Names of tensors whose optimizer states the checkpoint has, and which no rank trains."""
        moving = set(self._names.parameters.values()) - self._names.frozen
        trained = {self.fit.source(place).name for place in moving if self.fit.has(place)}
        kept = (place.name.partition("/") for place in self._stored.tensors if place.stem != MODEL)
        return sorted({name for quantity, _, name in kept if quantity not in RESERVED} - trained)

    def left_out(self, values: Iterable[tuple[str, str]]) -> set[str]:
        """Parameters of which the checkpoint does not have these (parameter, quantity), or not the parameter.

        Raises:
            CheckpointError: the states of a parameter that it has are missing (`strict`).
        """
        names = {name for name in self.parameters if not self._has(name)}
        for parameter, quantity in sorted(values):
            if parameter in names or of_quantity(quantity, self._source(parameter)) in self._stored.tensors:
                continue
            if self._strict:
                raise CheckpointError(
                    f"it has no {quantity} of '{parameter}', which is trained here: load_module_strict=False begins "
                    "its states anew, load_optimizer_states=False those of all parameters"
                )
            names.add(parameter)
        return names

    def check(self, optimizer: Iterable[tuple[str, str]]) -> None:
        """Finds out whether all that this rank takes can be read.

        Args:
            optimizer: (parameter, quantity) of what the optimizer keeps once its state has been loaded.

        Raises:
            OSError, CheckpointError: a file cannot be read, or has other bytes than were saved.
        """
        self._kept = set(optimizer)
        slices: dict[str, ShardSlice] = {}
        for quantity in self._state.quantities():
            if quantity.name == WEIGHT:
                for s in quantity.slices:
                    slices[s.slot.name] = s
                    self._check_weights(s.slot.name, s.parameter_offset, s.numel, _dtype_of(quantity))
        for name, tensor in self._state.untrained().items():
            self._check_weights(name, 0, tensor.numel(), tensor.dtype)
        for parameter, name in sorted(self._kept):
            s = slices[parameter]
            for place in self._states(parameter, name):
                self._stored.check(place, s.parameter_offset, s.numel)
        for place, tensor in self._fitting_buffers():
            self._stored.check(place, 0, tensor.numel())
        self.bytes_read += self._stored.finish()

    @torch.no_grad()
    def take(self) -> None:
        """The training state, which is `rewriting`, takes its values.

        Raises:
            OSError, CheckpointError: a file cannot be read any more, or has other bytes now. Some values are there.
        """
        for quantity in self._state.quantities():
            for s in quantity.slices:
                self._take_slice(quantity, s)
        for name, tensor in self._state.untrained().items():
            self._take_tensor(self._weights(name, tensor.dtype), tensor)
        for place, tensor in self._fitting_buffers():
            self._take_tensor([place], tensor.detach())
        self.bytes_read += self._stored.finish()

    def _has(self, parameter: str) -> bool:
        return self.fit.has(self._names.of_parameter(parameter))

    def _source(self, parameter: str) -> Place:
        """Where the checkpoint has a parameter of this model."""
        return self.fit.source(self._names.of_parameter(parameter))

    def _fitting_buffers(self) -> Iterator[tuple[Place, Tensor]]:
        """With where the checkpoint has each."""
        for place, tensor in self._names.buffers.values():
            if self.fit.has(place):
                yield self.fit.source(place), tensor

    def _states(self, parameter: str, name: str) -> list[Place]:
        """Where a quantity of the optimizer is; nowhere, if the checkpoint does not have it."""
        places = [of_quantity(name, self._source(parameter))] if self._has(parameter) else []
        return [place for place in places if place in self._stored.tensors]

    def _weights(self, name: str, dtype: torch.dtype) -> list[Place]:
        """Where weights are: as fp32 masters, as what the model computed with and the remainders, or as that alone."""
        if not self._has(name):
            return []
        place = self._source(name)
        master, remainder = (of_quantity(kind, place) for kind in (WEIGHT, REMAINDER))
        is_full = dtype in FULL
        if is_full and master in self._stored.tensors:
            return [master]
        return [place, remainder] if is_full and remainder in self._stored.tensors else [place]

    def _check_weights(self, name: str, first: int, numel: int, dtype: torch.dtype) -> None:
        places = self._weights(name, dtype)
        for place in places:
            self._stored.check(place, first, numel)
        dtypes = tuple(self._stored.dtype(place) for place in places)
        if len(places) == 2 and dtypes != SPLIT:
            raise CheckpointError(f"'{places[0].name}' and its remainder are {dtypes[0]} and {dtypes[1]}, not {SPLIT}")
        if len(places) == 1 and dtype in FULL and dtypes[0] in HALVES and self._has_masters:
            self.rounded.append(name)

    def _take_slice(self, quantity: Quantity, s: ShardSlice) -> None:
        """A part of a parameter, straight to where it is kept if it is kept like that."""
        if quantity.name == WEIGHT:
            places = self._weights(s.slot.name, _dtype_of(quantity))
        elif (s.slot.name, quantity.name) in self._kept:
            places = self._states(s.slot.name, quantity.name)
        else:
            places = []
        if not places:
            return
        targets = _targets(quantity, len(places))
        if len(targets) == len(places) and all(map(self._stored.reads_into, places, targets)):
            for place, target in zip(places, targets, strict=True):
                self._stored.read(place, s.parameter_offset, target[s.in_shard])
        else:
            take = partial(self._convert, quantity.take, s.shard_offset)
            self._stored.pass_on(places, s.parameter_offset, s.numel, take)

    def _take_tensor(self, places: list[Place], tensor: Tensor) -> None:
        """A tensor that every rank has as a whole."""
        if len(places) == 1:
            self._stored.read_whole_into(places[0], tensor)
        elif places:
            joined = torch.empty(tensor.numel(), dtype=torch.float32, device=HOST)
            self._stored.pass_on(places, 0, joined.numel(), partial(self._convert, partial(_copy, joined), 0))
            self.bytes_read += self._stored.finish()
            tensor.copy_(joined.view(tensor.shape))

    def _convert(
        self, take: Callable[[slice, Tensor], object], offset: int, first: int, values: Sequence[Tensor]
    ) -> None:
        """Hands on elements as the checkpoint has them, of split masters both parts. offset: added to `first`."""
        taken, numel = values[0], len(values[0])
        if len(values) == 2:
            if len(self._joined) < numel:
                self._joined = flat_buffer(numel, torch.float32)
            taken = self._joined[:numel]
            kernels.join_master(taken, *values)
        take(slice(offset + first, offset + first + numel), taken)


def _dtype_of(quantity: Quantity) -> torch.dtype:
    """Of the weights of a unit, as they are kept at their finest."""
    return torch.float32 if isinstance(quantity.unit, Unit) else quantity.unit.dtype


def _targets(quantity: Quantity, sources: int) -> list[Tensor]:
    """What has the values of a quantity, where so many tensors of a checkpoint have them in the same way; else
    nothing."""
    stored = quantity.stored()
    if sources == 2:
        return [stored[""], stored[REMAINDER]] if REMAINDER in stored else []
    return [] if REMAINDER in stored else [stored.get(WEIGHT, next(iter(stored.values())))]


def _copy(flat: Tensor, part: slice, values: Tensor) -> None:
    flat[part].copy_(values)
