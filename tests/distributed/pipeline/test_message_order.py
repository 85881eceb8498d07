"""Messages and reductions of a pipeline cannot wait for each other in a circle."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from launch_order import Record, circle_of, noting_order
from pipelines import Shape, config_for, train

# With several stages on a rank a rank may have two messages under way to another one before that takes the first.
ONE_STAGE = ("gpipe", "1f1b", "zb-h1", "zb-h2")
SEVERAL_STAGES = ("interleaved", "looped-bfs", "dualpipe-v", "zb-v", "v-half", "v-min")
not_slow = ("1f1b", "interleaved")


def _pair(source: int, destination: int) -> str:
    return "{}-{}".format(*sorted((source, destination)))


def _trained(shape: Shape, pipe: int, config: dict[str, Any], stream_per_pair: bool) -> Record:
    with noting_order(_pair if stream_per_pair else "{}>{}".format) as record:
        train(partial(shape.module, pipe), config, steps=2)
    return record


def _records(ranks: Any, pipe: int, copies: int, schedule: str, *, stream_per_pair: bool = False) -> list[Record]:
    config = config_for(2 * pipe, pipeline={"schedule": schedule})
    records = ranks(pipe * copies).run(_trained, Shape(blocks=6, tied=True), pipe, config, stream_per_pair)
    assert all(any("message" in key for key in record.launches()) for record in records)
    assert copies == 1 or all(any("reduce" in key for key in record.launches()) for record in records)
    return list(records)


@pytest.mark.parametrize(
    ("pipe", "copies"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "schedule",
    [
        name if name in not_slow else pytest.param(name, marks=pytest.mark.slow)
        for name in (*ONE_STAGE, *SEVERAL_STAGES)
    ],
)
def test_nothing_waits_in_a_circle(ranks, pipe, copies, schedule):
    """With a stream for each direction between two ranks. With one stage per rank a single queue will do for all."""
    records = _records(ranks, pipe, copies, schedule)
    assert circle_of(records, one_queue=schedule in ONE_STAGE) is None


def test_one_stream_for_both_directions_would_be_a_deadlock(ranks):
    """A communicator of two ranks has one: so each direction has a communicator."""
    records = _records(ranks, 2, 1, "1f1b", stream_per_pair=True)
    assert circle_of(records, one_queue=False) is not None
