"""Where ranks stand in a grid of pipeline stages and data-parallel copies: plain arithmetic."""

from __future__ import annotations

import pytest
from partita.comm import Coordinates, GridShape


def test_the_ranks_of_a_data_group_are_adjacent():
    """As in DeepSpeed: 2 stages of 3 ranks each."""
    shape = GridShape(pipe=2, data=3)
    assert shape.world_size == 6
    assert shape.data_groups == [[0, 1, 2], [3, 4, 5]]
    assert shape.pipe_groups == [[0, 3], [1, 4], [2, 5]]
    assert [shape.coordinates(r) for r in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert shape.coordinates(4) == Coordinates(pipe=1, data=1)


@pytest.mark.parametrize(("pipe", "data"), [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5)])
def test_every_rank_is_in_one_group_of_each_axis(pipe, data):
    """At its coordinates."""
    shape = GridShape(pipe, data)
    for rank in range(shape.world_size):
        at = shape.coordinates(rank)
        assert shape.rank_at(*at) == rank
        assert [group.index(rank) for group in shape.data_groups if rank in group] == [at.data]
        assert [group.index(rank) for group in shape.pipe_groups if rank in group] == [at.pipe]
        assert rank in shape.data_groups[at.pipe]
        assert rank in shape.pipe_groups[at.data]


def test_the_world_must_divide():
    """The error names both numbers."""
    assert GridShape.of_world(12, 3) == GridShape(pipe=3, data=4)
    assert GridShape.of_world(4, 4) == GridShape(pipe=4, data=1)
    for world_size, pipe in ((6, 4), (2, 4), (4, 0), (4, -2)):
        with pytest.raises(ValueError, match=f"{world_size} ranks do not divide evenly among {pipe} pipeline stages"):
            GridShape.of_world(world_size, pipe)


def test_what_is_not_in_the_grid_is_refused():
    """Numbers of ranks, places and sizes."""
    shape = GridShape(2, 3)
    for rank in (-1, 6):
        with pytest.raises(ValueError, match=f"rank {rank}: the grid has the ranks 0 to 5"):
            shape.coordinates(rank)
    for place in ((-1, 0), (2, 0), (0, -1), (0, 3)):
        with pytest.raises(ValueError, match="is not in a grid of 2 x 3"):
            shape.rank_at(*place)
    for sizes in ((0, 1), (1, 0), (-1, -1)):
        with pytest.raises(ValueError, match="has no rank"):
            GridShape(*sizes)
