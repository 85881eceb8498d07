"""P7: layers are split into stages as evenly as trying all ways finds."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partita.pipeline import ScheduleError, balanced


def tried(weights: list[int], parts: int) -> tuple[int, int]:
    """The smallest (largest sum, sum of squares) over all ways to cut."""
    ways = []
    for cuts in combinations(range(1, len(weights)), parts - 1):
        places = [0, *cuts, len(weights)]
        sums = [sum(weights[a:b]) for a, b in pairwise(places)]
        ways.append((max(sums), sum(one * one for one in sums)))
    return min(ways)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_brute_force_agrees(weights, data):
    parts = data.draw(st.integers(1, len(weights)))
    runs = balanced(weights, parts)
    assert [i for run in runs for i in run] == list(range(len(weights)))
    assert len(runs) == parts and all(runs)
    sums = [sum(weights[i] for i in run) for run in runs]
    assert (max(sums), sum(one * one for one in sums)) == tried(weights, parts)


def test_equal_layers_are_spread():
    assert sorted(len(run) for run in balanced([1] * 10, 4)) == [2, 2, 3, 3]


def test_a_large_model_is_split_at_once():
    """GPT-like: embedding, 400 layers, head; 64 stages."""
    runs = balanced([50_000.0, *[7_000.0] * 400, 50_000.0], 64)
    assert len(runs) == 64 and len(runs[0]) < len(runs[1])


@pytest.mark.parametrize(
    "weights, parts, message",
    [([1, 2], 3, "2 layers do not make 3 stages"), ([1], 0, "0 stages"), ([1, -1], 1, "from 0 on")],
)
def test_what_cannot_be_split_is_refused(weights, parts, message):
    with pytest.raises(ScheduleError, match=message):
        balanced(weights, parts)
