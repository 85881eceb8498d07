"""Values of a checkpoint on their way into a training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.fit import Fit
from partita.checkpoint.pieces import MODEL, REMAINDER, RESERVED, Place, StoredNames, of_quantity
from partita.checkpoint.saved_state import SavedState
from partita.checkpoint.stored import Stored
from partita.device import HOST, kernels
from partita.model import WEIGHT, TrainState
from partita.units import ShardSlice, Unit

HALVES = (torch.float16, torch.bfloat16)


class ValueReader:
    """Reads what this rank has, and beside that the rest of the chunks in which it begins and ends. Nothing of the
    training state changes before everything has been read.

    Attributes:
        bytes_read: so far.
        fit: how the names of the model and of the checkpoint go together.
        rounded: parameters of this rank that take a 16-bit value in place of an fp32 weight, which the checkpoint has
            of others.

    Raises:
        CheckpointError: names or shapes of the model's tensors differ (`strict`; lists them), or nothing fits.
    """

    def __init__(self, state: TrainState, stored: Stored, saved: SavedState, strict: bool) -> None:
        self._state = state
        self._stored = stored
        self._strict = strict
        self.bytes_read = 0
        self._names = names = StoredNames(state)
        parameters = {names.of_parameter(name): shape for name, shape in state.parameter_shapes().items()}
        buffers = {Place(MODEL, name): tuple(buffer.shape) for name, buffer in names.buffers.items()}
        self.fit = Fit(parameters, buffers, {p: t.shape for p, t in stored.tensors.items()}, saved.aliases)
        if strict:
            self.fit.require_all()
        self.fit.require_any()
        has_masters = (WEIGHT + "/", REMAINDER + "/")
        self._has_masters = any(p.stem != MODEL and p.name.startswith(has_masters) for p in stored.tensors)
        self.rounded: list[str] = []
        self._slices: dict[str, ShardSlice] = {}
        self._values: dict[tuple[str, str], Tensor] = {}  # by parameter and quantity
        self._buffers: dict[str, Tensor] = {}

    @property
    def parameters(self) -> list[str]:
        """Of the model."""
        return list(self._state.parameter_shapes())

    def names_before(self, saved: SavedState) -> dict[str, str]:
        """The names of parameters of this model, with those that they had in the model that was saved. Without those
        that the checkpoint does not have."""
        there = {stored: name for name, stored in saved.parameters.items()}
        stored = {name: self._source(name).name for name in self.parameters if self._has(name)}
        return {name: there.get(source, source) for name, source in stored.items()}

    def unused_states(self) -> list[str]:
        """Names of tensors whose optimizer states the checkpoint has, and which are not trained here."""
        slots = [s for q in self._state.quantities() if isinstance(q.unit, Unit) for s in q.unit.layout.slots]
        trained = {self._source(slot.name).name for slot in slots if self._has(slot.name)}
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

    def read(self, optimizer: Iterable[tuple[str, str]]) -> None:
        """Reads all that this rank has into memory of its own, for `write()`.

        Args:
            optimizer: (parameter, quantity) of what the optimizer keeps.

        Raises:
            OSError, CheckpointError: a file cannot be read, or has other bytes than were saved.
        """
        after: list[Callable[[], object]] = []
        for quantity in self._state.quantities():
            if quantity.name == WEIGHT:
                dtype = torch.float32 if isinstance(quantity.unit, Unit) else quantity.unit.dtype
                for s in quantity.slices:
                    self._slices[s.slot.name] = s
                    after += self._read_weights(s.slot.name, s.parameter_offset, s.numel, dtype)
        for name, tensor in self._state.untrained().items():
            after += self._read_weights(name, 0, tensor.numel(), tensor.dtype)
        for parameter, name in optimizer:
            if self._has(parameter):
                s, place = self._slices[parameter], of_quantity(name, self._source(parameter))
                if place in self._stored.tensors:
                    self._values[parameter, name] = self._read(place, s.parameter_offset, s.numel)
        for name, tensor in self._fitting_buffers():
            self._buffers[name] = self._read(self.fit.source(Place(MODEL, name)), 0, tensor.numel())
        self.bytes_read += self._stored.finish()
        for step in after:
            step()

    @torch.no_grad()
    def write(self) -> None:
        """The training state takes what was read. A collective."""
        for quantity in self._state.quantities():
            flat = quantity.read()
            if quantity.name == WEIGHT:
                values = torch.zeros_like(flat)
                for s in quantity.slices:
                    read = self._values.pop((s.slot.name, WEIGHT), None)
                    values[s.in_shard] = flat[s.in_shard] if read is None else read.to(flat.device)
                quantity.write(values)
                continue
            for s in quantity.slices:
                if (read := self._values.pop((s.slot.name, quantity.name), None)) is not None:
                    flat[s.in_shard].copy_(read)
        for name, tensor in self._state.untrained().items():
            if (read := self._values.pop((name, WEIGHT), None)) is not None:
                tensor.copy_(read.view(tensor.shape))
        for name, tensor in self._fitting_buffers():
            tensor.detach().copy_(self._buffers.pop(name).view(tensor.shape))

    def _has(self, parameter: str) -> bool:
        return self.fit.has(self._names.of_parameter(parameter))

    def _source(self, parameter: str) -> Place:
        """Where the checkpoint has a parameter of this model."""
        return self.fit.source(self._names.of_parameter(parameter))

    def _fitting_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._names.buffers.items():
            if self.fit.has(Place(MODEL, name)):
                yield name, tensor

    def _read(self, place: Place, first: int, numel: int) -> Tensor:
        """Elements from `first` on in the dtype that they have; they are there after `finish()`."""
        values = torch.empty(numel, dtype=self._stored.dtype(place), device=HOST)
        self._stored.read(place, first, values)
        return values

    def _read_weights(self, name: str, first: int, numel: int, dtype: torch.dtype) -> list[Callable[[], object]]:
        """Weights from what there is: fp32 masters, split masters, or what the model computed with. Returns what is to
        be done once they are there."""
        if not self._has(name):
            return []
        place = self._source(name)
        master, remainder = (of_quantity(kind, place) for kind in (WEIGHT, REMAINDER))
        is_full = dtype in (torch.float32, torch.float64)
        if is_full and master in self._stored.tensors:
            place = master
        values = self._values[name, WEIGHT] = self._read(place, first, numel)
        if not is_full or remainder not in self._stored.tensors:
            if is_full and values.dtype in HALVES and self._has_masters:
                self.rounded.append(name)
            return []
        joined = self._values[name, WEIGHT] = torch.empty(numel, dtype=torch.float32, device=HOST)
        lower = self._read(remainder, first, numel)
        return [lambda: kernels.join_master(joined, values, lower)]
