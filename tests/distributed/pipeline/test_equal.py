"""Every schedule trains as one process does: with ties, skips, activation checkpoints and data-parallel copies."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from partita.pipeline import NAMES, ScheduleError, by_name
from pipelines import PRECISIONS, Shape, Trained, config_for, merged, micro_batch, plain, train

SHAPES = {
    "plain": Shape(),
    "tied": Shape(tied=True),
    "skips": Shape(skips={3: [1], 5: [1, 2], 6: [0]}),
}
SCHEDULES = [name for name in NAMES if name != "forward-only"]


def run(ranks: Any, pipe: int, copies: int, shape: Shape, config: dict[str, Any], **more: Any) -> Trained:
    options = more.pop("options", {})
    return merged(ranks(pipe * copies).run(partial(train, **more), partial(shape.module, pipe, **options), config))


def config_of(schedule: str, micro_batches: int, **changes: Any) -> dict[str, Any]:
    return config_for(micro_batches, pipeline={"schedule": schedule}, **changes)


def assert_close(ours: Trained, theirs: Trained) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)
    assert ours.evaluated == pytest.approx(theirs.evaluated, rel=1e-5)
    assert ours.weights.keys() <= theirs.weights.keys()
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_same_bits(ours: Trained, theirs: Trained) -> None:
    assert (ours.losses, ours.evaluated) == (theirs.losses, theirs.evaluated)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-6)  # summed in another order
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        assert torch.equal(ours.weights[name], value), name


# Micro-batches that every family takes with these ranks.
FITTING = {1: 2, 2: 4, 3: 6, 4: 8}


@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pipe", [1, 2, 3, 4])
def test_one_process_trains_the_same(ranks, pipe, schedule, shape, clip):
    """P1, P2 in fp32."""
    count = FITTING[pipe]
    ours = run(ranks, pipe, 1, SHAPES[shape], config_of(schedule, count, gradient_clipping=clip))
    assert_close(ours, plain(SHAPES[shape], count, clip=clip))


@cache
def unsplit(ranks: Any, precision: str, stage: int) -> Trained:
    config = config_of("1f1b", 4, zero_optimization={"stage": stage}, **PRECISIONS[precision])
    return run(ranks, 1, 1, SHAPES["plain"], config)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pipe", [2, 4])
def test_divisions_and_schedules_give_the_same_bits(ranks, pipe, schedule, stage, precision):
    """Not with ties and skips: sums of three gradients depend on their order."""
    if schedule == "dualpipe-v" and pipe == 4:
        pytest.skip("it needs 8 micro-batches")
    config = config_of(schedule, 4, zero_optimization={"stage": stage}, **PRECISIONS[precision])
    assert_same_bits(run(ranks, pipe, 1, SHAPES["plain"], config), unsplit(ranks, precision, stage))


@pytest.mark.parametrize("micro_batches", range(1, 5))
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zb-v", "v-min"])
def test_any_number_of_micro_batches(ranks, schedule, micro_batches):
    """P4: M from 1 to 2P."""
    if schedule == "interleaved" and micro_batches == 3:
        pytest.skip("it divides into no rounds of two")
    ours = run(ranks, 2, 1, SHAPES["tied"], config_of(schedule, micro_batches), steps=2)
    assert_close(ours, plain(SHAPES["tied"], micro_batches, steps=2))


@pytest.mark.slow
@pytest.mark.parametrize("pipe", [3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_number_of_micro_batches_on_more_ranks(ranks, schedule, pipe):
    """P4, with ties, skips and activation checkpoints; M from 1 to 2P, where the family takes so many."""
    shape = Shape(tied=True, skips={3: [1], 5: [1, 2]})
    for micro_batches in range(1, 2 * pipe + 1):
        try:
            by_name(schedule, pipe, micro_batches)
        except ScheduleError:
            continue
        options = {"activation_checkpoint_interval": micro_batches % 3}
        ours = run(ranks, pipe, 1, shape, config_of(schedule, micro_batches), steps=2, options=options)
        assert_close(ours, plain(shape, micro_batches, steps=2))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("shape", ["tied", "skips"])
def test_pipelines_are_data_parallel(ranks, schedule, stage, shape):
    config = config_of(schedule, 4, zero_optimization={"stage": stage}, gradient_clipping=0.05)
    ours = run(ranks, 2, 2, SHAPES[shape], config)
    assert_close(ours, plain(SHAPES[shape], 4, copies=2, clip=0.05))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
@pytest.mark.parametrize("interval", [1, 2])
def test_activation_checkpoints(ranks, schedule, interval):
    config = config_of(schedule, 4)
    options = {"activation_checkpoint_interval": interval}
    kept = run(ranks, 2, 1, SHAPES["plain"], config)
    assert_same_bits(run(ranks, 2, 1, SHAPES["plain"], config, options=options), kept)
    kept = run(ranks, 2, 1, SHAPES["skips"], config)
    assert_close(run(ranks, 2, 1, SHAPES["skips"], config, options=options), kept)


def _uneven(step: int, index: int) -> Any:
    return micro_batch(step, index, sizes=(3, 3, 3, 1))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_the_last_batch_may_be_smaller(ranks, schedule):
    """P4. Its mean loss counts as much as that of any micro-batch."""
    ours = run(ranks, 2, 1, SHAPES["tied"], config_of(schedule, 4), batch=_uneven)
    assert_close(ours, plain(SHAPES["tied"], 4, batch=_uneven))
