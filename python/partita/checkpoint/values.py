"""Values of a checkpoint on their way into a training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.pieces import MODEL, Place, StoredNames, of_quantity
from partita.checkpoint.stored import Stored
from partita.device import HOST, kernels
from partita.model import WEIGHT, TrainState
from partita.units import ShardSlice, Unit

NAMED = 5  # problems in one message
OTHER_PLACES = ("parameter/", "buffer/")  # of the model's tensors that its state dict leaves out


class ValueReader:
    """Reads what this rank has, and beside that the rest of the chunks in which it begins and ends. Nothing of the
    training state changes before everything has been read.

    Attributes:
        bytes_read: so far.

    Raises:
        CheckpointError: names or shapes of the model's tensors differ (`strict`); lists them.
    """

    def __init__(self, state: TrainState, stored: Stored, strict: bool) -> None:
        self._state = state
        self._stored = stored
        self._strict = strict
        self.bytes_read = 0
        self._names = names = StoredNames(state)
        shapes = {names.of_parameter(name): shape for name, shape in state.parameter_shapes().items()}
        shapes |= {names.of_buffer(name): tuple(buffer.shape) for name, buffer in state.buffers().items()}
        saved = {place: tensor.shape for place, tensor in stored.tensors.items()}
        self._slices: dict[str, ShardSlice] = {}
        self._values: dict[tuple[str, str], Tensor] = {}  # by parameter and quantity
        self._others: dict[Place, Tensor] = {}
        self._missing = {place for place, shape in shapes.items() if saved.get(place) != shape}
        if strict:
            _require_same(shapes, saved)

    @property
    def parameters(self) -> list[str]:
        """Of the model."""
        return list(self._state.parameter_shapes())

    def left_out(self, values: Iterable[tuple[str, str]]) -> set[str]:
        """Parameters of which the checkpoint does not have these (parameter, quantity), or not the parameter.

        Raises:
            CheckpointError: the states of a parameter that it has are missing (`strict`).
        """
        names = {name for name in self.parameters if not self._has(name)}
        for parameter, quantity in sorted(values):
            if parameter in names or of_quantity(quantity, parameter) in self._stored.tensors:
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
                for s in quantity.slices:
                    self._slices[s.slot.name] = s
                    if self._has(s.slot.name):
                        dtype = torch.float32 if isinstance(quantity.unit, Unit) else quantity.unit.dtype
                        after += self._read_weights(s, dtype)
        for parameter, name in optimizer:
            s, place = self._slices[parameter], of_quantity(name, parameter)
            if self._has(parameter) and place in self._stored.tensors:
                self._values[parameter, name] = self._read(place, s.parameter_offset, s.numel)
        for place, tensor in self._other_tensors():
            if place not in self._missing:
                self._others[place] = self._read(place, 0, tensor.numel())
        self.bytes_read += self._stored.finish()
        for step in after:
            step()

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
        for place, tensor in self._other_tensors():
            if place in self._others:
                tensor.copy_(self._others.pop(place).view(tensor.shape))

    def _has(self, parameter: str) -> bool:
        return self._names.of_parameter(parameter) not in self._missing

    def _other_tensors(self) -> Iterator[tuple[Place, Tensor]]:
        """What is not in units."""
        for name, tensor in self._state.untrained().items():
            yield self._names.of_parameter(name), tensor
        for name, tensor in self._state.buffers().items():
            yield self._names.of_buffer(name), tensor

    def _read(self, place: Place, first: int, numel: int) -> Tensor:
        """Elements from `first` on in the dtype that they have; they are there after `finish()`."""
        values = torch.empty(numel, dtype=self._stored.dtype(place), device=HOST)
        self._stored.read(place, first, values)
        return values

    def _read_weights(self, s: ShardSlice, dtype: torch.dtype) -> list[Callable[[], object]]:
        """Weights from what there is: fp32 masters, split masters, or what the model computed with. Returns what is to
        be done once they are there."""
        name, first, numel = s.slot.name, s.parameter_offset, s.numel
        place = self._names.of_parameter(name)
        master, remainder = (of_quantity(kind, name) for kind in (WEIGHT, "remainder"))
        if dtype == torch.float32 and master in self._stored.tensors:
            place = master
        values = self._values[name, WEIGHT] = self._read(place, first, numel)
        if dtype != torch.float32 or remainder not in self._stored.tensors:
            return []
        joined = self._values[name, WEIGHT] = torch.empty(numel, dtype=torch.float32, device=HOST)
        lower = self._read(remainder, first, numel)
        return [lambda: kernels.join_master(joined, values, lower)]


def _require_same(shapes: dict[Place, tuple[int, ...]], saved: dict[Place, tuple[int, ...]]) -> None:
    problems = [f"'{place.name}' is missing" for place in shapes if place not in saved]
    problems += [
        f"'{place.name}' has shape {saved[place]}, in the model {shape}"
        for place, shape in shapes.items()
        if place in saved and saved[place] != shape
    ]
    problems += [
        f"'{place.name}' is not in the model"
        for place in saved
        if place not in shapes and (place.stem == MODEL or place.name.startswith(OTHER_PLACES))
    ]
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CheckpointError(
            f"it is of another model: {'; '.join(problems[:NAMED])}{more}; load_module_strict=False loads the rest"
        )
