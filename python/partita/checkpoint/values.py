"""Values of a checkpoint on their way into a training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.pieces import MODEL, Place, StoredNames, of_quantity
from partita.checkpoint.stored import Stored
from partita.device import HOST, kernels
from partita.model import WEIGHT, Quantity, TrainState
from partita.units import ShardSlice, Unit

NAMED = 5  # problems in one message
OTHER_PLACES = ("parameter/", "buffer/")  # of the model's tensors that its state dict leaves out


class ValueReader:
    """Reads what this rank has, and no more than that beside the rest of the chunks in which it begins and ends.

    Attributes:
        bytes_read: so far.

    Raises:
        CheckpointError: names or shapes of the model's tensors differ (`strict`); lists them.
    """

    def __init__(self, state: TrainState, stored: Stored, strict: bool) -> None:
        self._state = state
        self._stored = stored
        self.bytes_read = 0
        self._names = names = StoredNames(state)
        shapes = {names.of_parameter(name): shape for name, shape in state.parameter_shapes().items()}
        shapes |= {names.of_buffer(name): tuple(buffer.shape) for name, buffer in state.buffers().items()}
        saved = {place: tensor.shape for place, tensor in stored.tensors.items()}
        self._missing = {place for place, shape in shapes.items() if saved.get(place) != shape}
        if strict:
            _require_same(shapes, saved)

    @property
    def parameters(self) -> list[str]:
        """Of the model."""
        return list(self._state.parameter_shapes())

    @property
    def left_out(self) -> list[str]:
        """Parameters that the checkpoint does not have, or with another shape."""
        return [name for name in self.parameters if not self._has(name)]

    def require(self, values: Iterable[tuple[str, str]]) -> None:
        """Raises CheckpointError unless there are these (parameter, quantity), but for parameters that are left out."""
        for parameter, quantity in sorted(values):
            place = of_quantity(quantity, parameter)
            if self._has(parameter) and place not in self._stored.tensors:
                raise CheckpointError(
                    f"it has no {quantity} of '{parameter}', which the optimizer needs: load_optimizer_states=False "
                    "goes on without its states"
                )

    def weights(self, quantity: Quantity) -> Tensor:
        """The weights of this rank's own range, as `Quantity.write` takes them."""
        unit = quantity.unit
        now = quantity.read()
        values = torch.zeros(now.shape, dtype=now.dtype, device=HOST)
        after: list[Callable[[], object]] = []
        for s in quantity.slices:
            part = values[s.in_shard]
            if self._has(s.slot.name):
                after += self._read_weights(s, part)
            else:
                part.copy_(now[s.in_shard])
        self._finish(after)
        return values.to(now.device if isinstance(unit, Unit) else unit.own_params.device)

    def others(self, optimizer: bool) -> None:
        """Reads into place what the optimizer keeps, if that is wanted, and what is not in units."""
        after: list[Callable[[], object]] = []
        if optimizer:
            for quantity in self._state.quantities():
                if quantity.name != WEIGHT:
                    self._read_quantity(quantity)
        for name, tensor in self._state.untrained().items():
            after += self._read_tensor(self._names.of_parameter(name), tensor)
        for name, tensor in self._state.buffers().items():
            after += self._read_tensor(self._names.of_buffer(name), tensor)
        self._finish(after)

    def _has(self, parameter: str) -> bool:
        return self._names.of_parameter(parameter) not in self._missing

    def _read_weights(self, s: ShardSlice, into: Tensor) -> list[Callable[[], object]]:
        """Weights in the dtype of `into`, from what there is: fp32 masters, split masters, or what the model had."""
        place = self._names.of_parameter(s.slot.name)
        master, remainder = (of_quantity(kind, s.slot.name) for kind in (WEIGHT, "remainder"))
        if master in self._stored.tensors and into.dtype == torch.float32:
            return self._read_cast(master, s.parameter_offset, into)
        if remainder in self._stored.tensors and into.dtype == torch.float32:
            upper = torch.empty(into.numel(), dtype=torch.bfloat16, device=HOST)
            lower = torch.empty(into.numel(), dtype=torch.int16, device=HOST)
            self._stored.read(place, s.parameter_offset, upper)
            self._stored.read(remainder, s.parameter_offset, lower)
            return [lambda: kernels.join_master(into, upper, lower)]
        return self._read_cast(place, s.parameter_offset, into)

    def _read_cast(self, place: Place, first: int, into: Tensor) -> list[Callable[[], object]]:
        dtype = self._stored.dtype(place)
        if dtype == into.dtype and into.is_contiguous():
            self._stored.read(place, first, into)
            return []
        values = torch.empty(into.numel(), dtype=dtype, device=HOST)
        self._stored.read(place, first, values)
        return [lambda: into.copy_(values)]

    def _read_quantity(self, quantity: Quantity) -> None:
        flat = quantity.read()
        for s in quantity.slices:
            place = of_quantity(quantity.name, s.slot.name)
            if self._has(s.slot.name) and place in self._stored.tensors:
                self._finish(self._read_cast(place, s.parameter_offset, flat[s.in_shard]))

    def _read_tensor(self, place: Place, tensor: Tensor) -> list[Callable[[], object]]:
        if place in self._missing:
            return []
        values = torch.empty(tensor.shape, dtype=self._stored.dtype(place), device=HOST)
        self._stored.read(place, 0, values.view(-1))
        return [lambda: tensor.copy_(values)]

    def _finish(self, after: list[Callable[[], object]]) -> None:
        self.bytes_read += self._stored.finish()
        for step in after:
            step()


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
