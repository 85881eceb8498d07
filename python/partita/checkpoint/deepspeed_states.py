"""Tensors out of DeepSpeed's flat partitions: where each parameter lies, and what the optimizer keeps for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """A tensor that is to be written: `parts`, flat, one after the other, have its elements.

    dtype: in which it is written.
    """

    shape: Shape
    dtype: torch.dtype
    parts: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """Of the whole tensor."""
        return sum(part.numel() for part in self.parts)


@dataclass
class Trained:
    """What is known of a parameter that was trained.

    master: in fp32. elements: by name, what the optimizer keeps for each element. rest: what it keeps besides.
    """

    master: Parts
    elements: dict[str, Parts] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that lie one after the other in a flat buffer of which each rank has a partition.

    shapes: by name, in their order. paddings: elements behind each. masters, states: of each rank.
    """

    shapes: dict[str, Shape]
    paddings: Sequence[int]
    masters: list[Tensor]
    states: list[dict[str, Any]]


def numel_of(shape: Shape) -> int:
    """Elements of a shape."""
    product = 1
    for length in shape:
        product *= length
    return product


def dense(value: Any, what: str) -> Tensor:
    """A flat view of a tensor's elements; a copy where they do not lie one after the other.

    Raises:
        CheckpointError: it is no tensor with memory of its own for each element.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{what} is a {type(value).__name__} and no tensor with values")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{what} has fewer values than its shape {tuple(value.shape)} asks for")
    return value.detach().contiguous().view(-1)


def cut(flats: Sequence[Tensor], begin: int, numel: int, what: str) -> list[Tensor]:
    """`numel` elements from `begin` on of flat tensors that follow each other.

    Raises:
        CheckpointError: there are fewer.
    """
    parts, end, start = [], begin + numel, 0
    for flat in flats:
        first, last = max(begin, start), min(end, start + flat.numel())
        if first < last:
            parts.append(flat[first - start : last - start])
        start += flat.numel()
    if end > start:
        raise CheckpointError(f"the partitions have {start:,} elements, but {what} would end at element {end:,}")
    return parts


def from_flat_groups(groups: Sequence[FlatGroup]) -> dict[str, Trained]:
    """Stages 1 and 2: a group's parameters are one after the other, and the ranks' partitions are too.

    Raises:
        CheckpointError: the partitions do not have what the shapes ask for.
    """
    found: dict[str, Trained] = {}
    for group in groups:
        masters = [dense(flat, "a partition of masters") for flat in group.masters]
        kept = [_kept_by(state, flat.numel()) for state, flat in zip(group.states, masters, strict=True)]
        states = _by_name(kept)
        begin = 0
        for (name, shape), padding in zip(group.shapes.items(), group.paddings, strict=True):
            numel = numel_of(shape)
            trained = Trained(_float32(shape, cut(masters, begin, numel, f"'{name}'")))
            for key, flats in states.items():
                trained.elements[key] = _kept_parts(shape, cut(flats, begin, numel, f"{key} of '{name}'"))
            trained.rest = kept[0][1]
            found[name] = trained
            begin += numel + padding
    return found


def from_slices(groups: Sequence[FlatGroup]) -> dict[str, Trained]:
    """Stage 3: of each parameter, each rank has a slice, all of one size, the last ones padded. A rank's slices are one
    after the other, over all groups.

    Raises:
        CheckpointError: the slices do not have what the shapes ask for.
    """
    ranks = range(len(groups[0].masters) if groups else 0)
    masters = [[dense(group.masters[r], "a partition of masters") for group in groups] for r in ranks]
    kept = [[_kept_by(group.states[r], masters[r][g].numel()) for g, group in enumerate(groups)] for r in ranks]
    states = {}
    for key in sorted({key for of_group in kept[0] for key in of_group[0]} if groups else ()):
        # A group without this state still has its place.
        states[key] = [[kept[r][g][0].get(key, masters[r][g]) for g in range(len(groups))] for r in ranks]
    found: dict[str, Trained] = {}
    begin = 0
    for g, group in enumerate(groups):
        for name, shape in group.shapes.items():
            trained = Trained(_float32(shape, _slices(masters, begin, shape, f"'{name}'")), rest=kept[0][g][1])
            for key in (key for key in states if key in kept[0][g][0]):
                trained.elements[key] = _kept_parts(shape, _slices(states[key], begin, shape, f"{key} of '{name}'"))
            found[name] = trained
            begin += -(-numel_of(shape) // len(ranks))
    return found


def fragments(shape: Shape, dtype: torch.dtype, flats: Sequence[Any], name: str) -> Parts:
    """A frozen parameter of stage 3, of which each rank has a slice."""
    slices = [[dense(flat, f"a slice of '{name}'")] for flat in flats]
    return Parts(shape, dtype, tuple(_slices(slices, 0, shape, f"'{name}'")))


def _slices(flats: Sequence[Sequence[Tensor]], begin: int, shape: Shape, what: str) -> list[Tensor]:
    left = numel_of(shape)
    length = -(-left // len(flats))
    parts: list[Tensor] = []
    for rank, of_rank in enumerate(flats):
        parts += cut(of_rank, begin, min(length, left), f"the slice of {what} on rank {rank}")
        left -= min(length, left)
    return parts


def _kept_by(state: Mapping[str, Any], numel: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a torch optimizer keeps for a partition: for each element, and besides."""
    elements: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or key == "step":
            rest[key] = value
        elif value.numel() < numel:
            raise CheckpointError(
                f"the optimizer keeps '{key}' of {value.numel():,} elements for a partition of {numel:,}: it treats "
                "elements together, and its states cannot be given to parameters; --weights-only leaves them out"
            )
        else:
            elements[key] = dense(value, f"a partition of '{key}'")[:numel]  # the last rank's has the padding too
    return elements, rest


def _by_name(kept: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, list[Tensor]]:
    keys = kept[0][0].keys() if kept else ()
    for rank, (elements, _) in enumerate(kept):
        if elements.keys() != keys:
            raise CheckpointError(f"rank {rank} has the states {sorted(elements)}, and rank 0 {sorted(keys)}")
    return {key: [elements[key] for elements, _ in kept] for key in keys}


def _float32(shape: Shape, parts: Sequence[Tensor]) -> Parts:
    return Parts(shape, torch.float32, tuple(parts))


def _kept_parts(shape: Shape, parts: Sequence[Tensor]) -> Parts:
    dtype = parts[0].dtype if parts else torch.float32
    return Parts(shape, torch.float32 if dtype.is_floating_point else dtype, tuple(parts))
