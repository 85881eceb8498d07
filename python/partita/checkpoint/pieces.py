"""What a training state puts into files: named tensors, and the part of each that this rank writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint.layout import TensorSpec
from partita.checkpoint.names import StoredNames
from partita.checkpoint.places import MODEL, RESERVED, Place, dtype_name, of_quantity
from partita.model import Quantity, TrainState
from partita.units import Slot, Unit


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor that this rank writes.

    shape: of the whole tensor. first: of the run in the flattened tensor. values: flat, contiguous; only
    an update changes them, or who writes into parameters.
    """

    place: Place
    shape: tuple[int, ...]
    first: int
    values: Tensor

    @property
    def is_weight(self) -> bool:
        """Whether it is of the model, as it computes or as it is kept beside that; otherwise the optimizer's alone."""
        return self.place.stem == MODEL or self.place.name.partition("/")[0] in RESERVED

    @property
    def spec(self) -> TensorSpec:
        """Of the whole tensor."""
        return TensorSpec(self.place.name, dtype_name(self.values.dtype), self.shape)


def pieces(state: TrainState, names: StoredNames) -> Iterator[Piece]:
    """What this rank writes. Together the ranks write each element of each tensor once.

    Raises:
        ValueError: the optimizer keeps something under a name that files cannot have for it; names it.
    """
    for quantity in state.quantities():
        if isinstance(quantity.unit, Unit):
            _require_plain(quantity.unit.states)
        yield from _pieces_of(quantity, names)
    for name, tensor in state.untrained().items():
        if not names.is_replica(name):
            flat, own = tensor.contiguous().view(-1), own_range(state, tensor)
            yield Piece(names.of_parameter(name), tuple(tensor.shape), own.start, flat[own])
    if state.data.rank == 0:
        for name, (place, tensor) in names.buffers.items():
            if place != Place(MODEL, name):
                continue  # a replica
            # A copy: forwards change buffers. The bits of a conjugate view are not those of its memory.
            values = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1)
            yield Piece(place, tuple(tensor.shape), 0, values)


def own_range(state: TrainState, tensor: Tensor) -> slice:
    """What this rank writes of a tensor that all ranks with the same parts have as a whole."""
    rank, ranks = state.data.rank, state.data.world_size
    return slice(tensor.numel() * rank // ranks, tensor.numel() * (rank + 1) // ranks)


def _require_plain(kept: Iterable[Any]) -> None:
    for key in kept:
        if not isinstance(key, str) or not key or "/" in key or key in RESERVED:
            raise ValueError(
                f"the optimizer keeps a value of each element under {key!r}: checkpoints need a text without '/' that "
                f"is none of {', '.join(RESERVED)}. Rename it in the optimizer"
            )


def _pieces_of(quantity: Quantity, names: StoredNames) -> Iterator[Piece]:
    for kind, flat in quantity.stored().items():
        for slot, first, where in shares(quantity):
            if names.is_replica(slot.name):
                continue
            parameter = names.of_parameter(slot.name)
            place = of_quantity(kind, parameter) if kind else parameter
            yield Piece(place, slot.shape, first, flat[where])


def shares(quantity: Quantity) -> Iterator[tuple[Slot, int, slice]]:
    """What this rank writes of each parameter: the first of the elements in the parameter, and where they are in the
    quantity. In stage 0 all ranks have everything, and each writes its shard."""
    unit = quantity.unit
    shard = unit.layout.shard_range(unit.communicator.rank)
    for s in quantity.slices:
        start = unit.own.start + s.shard_offset
        begin, end = max(start, shard.start), min(start + s.numel, shard.stop)
        if begin < end:
            yield s.slot, s.parameter_offset + begin - start, slice(begin - unit.own.start, end - unit.own.start)
