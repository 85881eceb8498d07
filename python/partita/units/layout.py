"""Where parameters lie in flat buffers: pure arithmetic, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm, prod

ALIGNMENT_BYTES = 128


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its unit, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    group: int  # of the optimizer

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return prod(self.shape)

    @property
    def in_unit(self) -> slice:
        """The parameter's elements in the full buffer."""
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class ShardSlice:
    """The part of a parameter that lies in a range of its unit."""

    slot: Slot
    parameter_offset: int  # where the part starts in the parameter
    shard_offset: int  # where the part starts in the range
    numel: int

    @property
    def in_parameter(self) -> slice:
        """The part's elements in the flattened parameter."""
        return slice(self.parameter_offset, self.parameter_offset + self.numel)

    @property
    def in_shard(self) -> slice:
        """The part's elements in a buffer of the range."""
        return slice(self.shard_offset, self.shard_offset + self.numel)


@dataclass(frozen=True)
class ParameterInfo:
    """What a layout needs to know of a parameter."""

    name: str
    shape: tuple[int, ...]
    group: int
    element_bytes: int
    kind: str  # parameters of different kinds (dtypes) never share a unit
    block: int | None = None  # the one module that needs the parameter; None: the root

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return prod(self.shape)


@dataclass(frozen=True)
class UnitLayout:
    """A run of parameters in one flat buffer. Every parameter starts on a 128-byte boundary, and so does every
    shard."""

    slots: tuple[Slot, ...]
    shard_numel: int
    world_size: int

    @property
    def numel(self) -> int:
        """Elements of the full buffer, padding included."""
        return self.shard_numel * self.world_size

    def shard_range(self, rank: int) -> range:
        """The elements of the full buffer that belong to `rank`."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of {self.world_size}")
        return range(rank * self.shard_numel, (rank + 1) * self.shard_numel)

    def slices(self, elements: range) -> list[ShardSlice]:
        """The parts of parameters that lie in a range of the full buffer, in order; empty parts are left out."""
        result = []
        for slot in self.slots:
            begin = max(slot.offset, elements.start)
            end = min(slot.offset + slot.numel, elements.stop)
            if begin < end:
                result.append(ShardSlice(slot, begin - slot.offset, begin - elements.start, end - begin))
        return result


def make_layout(parameters: Iterable[ParameterInfo], world_size: int, shard_multiple: int = 1) -> UnitLayout:
    """Lays parameters of one kind one behind the other; the elements of a shard are a multiple of `shard_multiple`."""
    slots: list[Slot] = []
    end, alignment = 0, 1
    for parameter in parameters:
        alignment = ALIGNMENT_BYTES // parameter.element_bytes
        end = _round_up(end, alignment)
        slots.append(Slot(parameter.name, parameter.shape, end, parameter.group))
        end += parameter.numel
    shard_numel = _round_up(-(-end // world_size), lcm(alignment, shard_multiple))
    return UnitLayout(tuple(slots), shard_numel, world_size)


def plan_buckets(parameters: list[ParameterInfo], bucket_numel: int) -> list[list[int]]:
    """Communication buckets: indices of parameters, in the order in which backward completes them.

    Gradients arrive roughly in the reverse order of registration, so buckets are filled from the last parameter on. A
    parameter joins the open bucket of its kind while that holds at most `bucket_numel` elements; one that is larger
    has a bucket of its own.
    """
    closed: list[list[int]] = []
    open_buckets: dict[str, tuple[list[int], int]] = {}  # by kind: parameters, their elements
    for i in reversed(range(len(parameters))):
        kind, numel = parameters[i].kind, parameters[i].numel
        bucket, filled = open_buckets.get(kind, ([], 0))
        if bucket and filled + numel > bucket_numel:
            closed.append(bucket)
            bucket, filled = [], 0
        bucket.append(i)
        open_buckets[kind] = (bucket, filled + numel)
    return closed + [bucket for bucket, _ in open_buckets.values()]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
