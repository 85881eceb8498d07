"""units/gather_pass.py: how far gathers run ahead; and the search for circles that tests of several ranks rely on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_order import Event, Record, circle_of, first_difference
from partita.units.gather_pass import Ahead


@pytest.mark.parametrize(
    ("numel", "room", "reach"),
    [
        (0, 100, [1, 2, 3, 4, 4]),  # the next one
        (60, 100, [2, 3, 4, 4, 4]),  # and another one
        (1000, 100, [3, 3, 4, 4, 4]),  # as many as there is room for, beside the one that computes
        (1000, 10, [0, 1, 2, 3, 4]),  # none
        (1000, 1000, [4, 4, 4, 4, 4]),
    ],
)
def test_how_far_gathers_run_ahead(numel, room, reach):
    assert Ahead(numel, room).reach([30, 30, 30, 30]) == reach


@given(st.lists(st.integers(0, 9)), st.integers(0, 30), st.integers(0, 40))
def test_what_runs_ahead_stays_within_its_bounds(blocks, numel, room):
    """And never less has been sent for than before."""
    reach = Ahead(numel, room).reach(blocks)
    assert len(reach) == len(blocks) + 1
    assert reach == sorted(reach)
    for computing, sent in enumerate(reach):
        assert computing <= sent <= len(blocks)
        if sent > max(computing, *reach[:computing], 0):  # something is sent for here
            own = [0, *blocks][computing]
            assert own + sum(blocks[computing:sent]) <= room
            assert sent == computing + 1 or sum(blocks[computing:sent]) <= numel


def _record(*events: str) -> Record:
    """From "launch a0" or "wait a0": the first letter is the communicator."""
    pairs = [event.split() for event in events]
    return Record([Event(what, key, key[0]) for what, key in pairs])


def test_records_of_one_order_have_no_circle():
    ranks = [
        _record("launch g0", "launch g1", "wait g0", "launch r0", "wait g1", "launch r1", "wait r0", "wait r1"),
        _record("launch g0", "wait g0", "launch g1", "launch r0", "wait r0", "launch r1", "wait g1", "wait r1"),
    ]
    assert circle_of(ranks) is None
    assert first_difference(ranks) is None


def test_a_wait_before_a_launch_that_others_wait_for_is_a_circle():
    """As if one rank waited for a reduction before it sent for a block, and the other one the other way round."""
    ranks = [_record("launch r0", "wait r0", "launch g0"), _record("launch g0", "wait g0", "launch r0")]
    circle = circle_of(ranks)
    assert circle is not None
    assert {"g0", "r0"} <= set(circle)
    assert first_difference(ranks) == "rank 0: ['r0', 'g0']; rank 1: ['g0', 'r0']"


def test_a_collective_behind_another_holds_up_what_follows():
    """Nobody waits. With one queue, r1 at its head waits for r0, and g1 for g0."""
    ranks = [_record("launch r0", "launch r1", "launch g0", "launch g1")]
    assert circle_of(ranks) is None
    ranks.append(_record("launch g0", "launch g1", "launch r0", "launch r1"))
    assert circle_of(ranks) is not None
    assert circle_of([_record("launch r0", "launch g0"), _record("launch g0", "launch r0")]) is None
