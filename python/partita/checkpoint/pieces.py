"""What a training state puts into files: named tensors, and the part of each that this rank writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.model import WEIGHT, Quantity, TrainState
from partita.units import Unit

MODEL, OPTIMIZER = "model", "optimizer"  # what the names of files begin with


@dataclass(frozen=True)
class Place:
    """A tensor in a checkpoint: in which files it is, and its name there."""

    stem: str
    name: str


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor that this rank writes.

    first: of the run in the flattened tensor. values: flat, contiguous.
    """

    place: Place
    shape: tuple[int, ...]
    first: int
    values: Tensor


class StoredNames:
    """The names that the model's tensors have in files: those of its state dict, where that has them.

    Attributes:
        aliases: other names of tensors that a state dict has several times, with the name that is stored.
        order: the names in the model's files.
    """

    def __init__(self, state: TrainState) -> None:
        self.aliases: dict[str, str] = {}
        self._names: dict[int, str] = {}  # by the identity of a parameter or a buffer
        for module in state.modules:
            values: dict[str, Any] = module.state_dict(keep_vars=True)
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"'{name}' in the model's state dict is a {type(value).__name__} and no tensor: keep it in a "
                        "buffer, or in client_state"
                    )
                first = self._names.setdefault(id(value), name)
                if first != name:
                    self.aliases[name] = first
        self.order = list(self._names.values())
        self._parameters = {n: id(p) for module in state.modules for n, p in module.named_parameters()}
        self._buffers = {n: id(b) for module in state.modules for n, b in module.named_buffers()}

    def of_parameter(self, name: str) -> Place:
        """Where a parameter of this name in the model is."""
        stored = self._names.get(self._parameters[name])
        return Place(OPTIMIZER, f"parameter/{name}") if stored is None else Place(MODEL, stored)

    def of_buffer(self, name: str) -> Place:
        """Where a buffer of this name in the model is."""
        stored = self._names.get(self._buffers[name])
        return Place(OPTIMIZER, f"buffer/{name}") if stored is None else Place(MODEL, stored)


def stem_of(file: str) -> str:
    """What the name of a .safetensors file begins with."""
    return file.removesuffix(".safetensors").partition("-")[0]


def of_quantity(name: str, parameter: str) -> Place:
    """Where a quantity of a parameter is."""
    return Place(OPTIMIZER, f"{name}/{parameter}")


def pieces(state: TrainState, names: StoredNames) -> Iterator[Piece]:
    """What this rank writes. Together the ranks write each element of each tensor once."""
    for quantity in state.quantities():
        yield from _pieces_of(quantity, names)
    rank, world_size = state.world.rank, state.world.world_size
    for name, tensor in state.untrained().items():
        begin, end = (tensor.numel() * r // world_size for r in (rank, rank + 1))
        flat = tensor.contiguous().view(-1)
        yield Piece(names.of_parameter(name), tuple(tensor.shape), begin, flat[begin:end])
    if rank == 0:
        for name, tensor in state.buffers().items():
            yield Piece(names.of_buffer(name), tuple(tensor.shape), 0, tensor.detach().contiguous().view(-1))


def _pieces_of(quantity: Quantity, names: StoredNames) -> Iterator[Piece]:
    unit = quantity.unit
    stored: dict[str, Tensor]
    if quantity.name == WEIGHT:
        stored = unit.stored_weights() if isinstance(unit, Unit) else {"": unit.own_params}
    else:
        stored = {quantity.name: quantity.read()}
    # In stage 0 all ranks have everything. Each writes its shard.
    shard = unit.layout.shard_range(unit.communicator.rank)
    for kind, flat in stored.items():
        for s in quantity.slices:
            start = unit.own.start + s.shard_offset
            begin, end = max(start, shard.start), min(start + s.numel, shard.stop)
            if begin < end:
                name = s.slot.name
                place = of_quantity(kind, name) if kind else names.of_parameter(name)
                values = flat[begin - unit.own.start : end - unit.own.start]
                yield Piece(place, s.slot.shape, s.parameter_offset + begin - start, values)
