"""Ranks as points of a grid with named axes; pure."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import product
from typing import Any

from partita.compat.deepspeed._absent import absent_names


class ProcessTopology:
    """A grid of ranks: the rank grows fastest along the last axis.

    Args:
        axes: their names.
        dims: ranks along each.

    Raises:
        ValueError: there is not one dimension for each axis, or one is not positive.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or any(dim < 1 for dim in dims):
            raise ValueError(f"ProcessTopology: axes {list(axes)} need one positive dimension each, not {list(dims)}")
        self.axes = list(axes)
        self.dims = list(dims)
        coordinates: Any = namedtuple("ProcessCoord", axes)  # type: ignore[misc]
        self.ProcessCoord = coordinates
        points: list[tuple[int, ...]] = list(product(*(range(dim) for dim in dims)))
        self.mapping: dict[Any, int] = {self.ProcessCoord(*point): rank for rank, point in enumerate(points)}

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a point that has a coordinate for each axis.

        Raises:
            ValueError: an axis is missing or unknown, or there is no such point.
        """
        if set(coord_kwargs) != set(self.axes):
            raise ValueError(
                f"get_rank() needs a coordinate for each of {self.axes}; filter_match() takes some of them"
            )
        point = self.ProcessCoord(**coord_kwargs)
        if point not in self.mapping:
            raise ValueError(f"get_rank(): {point} is not in a grid of {dict(zip(self.axes, self.dims, strict=True))}")
        return self.mapping[point]

    def get_axis_names(self) -> list[str]:
        """The axes, the one first along which ranks are farthest from each other."""
        return self.axes

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """A rank's place in words, "model_00" say, without some axes."""
        point = self.get_coord(rank)
        return outer_sep.join(
            f"{axis}{inner_sep}{getattr(point, axis):02d}" for axis in self.axes if axis not in omit_axes
        )

    def get_dim(self, axis: str) -> int:
        """Ranks along an axis; 0: there is no such axis."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_coord(self, rank: int) -> Any:
        """The point of a rank, whose attributes are the axes.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world_size():
            raise ValueError(f"rank {rank} is not in a grid of {self.world_size()} ranks")
        return list(self.mapping)[rank]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Of each line along an axis its ranks; empty: there is no such axis."""
        if axis not in self.axes:
            return []
        others = [other for other in self.axes if other != axis]
        lines: dict[tuple[int, ...], list[int]] = {}
        for point, rank in self.mapping.items():
            lines.setdefault(tuple(getattr(point, other) for other in others), []).append(rank)
        return list(lines.values())

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks whose coordinates are these."""
        wanted = filter_kwargs.items()
        return [rank for point, rank in self.mapping.items() if all(getattr(point, a) == i for a, i in wanted)]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks that are at `idx` along an axis."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        """Ranks of the grid."""
        return len(self.mapping)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipelines of `num_pp` ranks, `num_dp` of them; copies of a stage are neighbours."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """The same with a third axis, for tensor parallelism, which `PipelineModule` takes with one rank only."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


__getattr__ = absent_names(__name__)
