"""Activation checkpointing: parameters whose gradients arrive several times in one backward."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
from communicators import RecordingCommunicator, communicating_through
from gradient_models import Checkpointed, checkpointed, repeated
from reference import (
    DTYPES,
    PRECISIONS,
    assert_equal_runs,
    backward_of,
    sgd_config,
    tokens_of,
    train_in_engine,
    train_plain,
)

STAGES = (0, 1, 2, 3)


@pytest.mark.pairwise
@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_shared_and_frozen_parameters(ranks, stage, reentrant, backward):
    """G12. Gradients that arrive several times in one backward are reduced once, whole."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=40)
    runs = ranks(2).run(train_in_engine, checkpointed(reentrant), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 4))


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reentrant_checkpointing_in_16_bits(ranks, precision, backward):
    """G12. The loss is scaled once though backward is entered again."""
    config = sgd_config(stage=1, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, checkpointed(True), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 2, DTYPES[precision]), precision)


def _launches_of_a_backward(config: dict[str, Any], backward: str) -> tuple[list[int], int]:
    """Launches in each step's backward, and the number of units."""
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(model=Checkpointed(reentrant=True), config=config)
        launches = []
        for step in range(3):
            recorder.events.clear()
            backward_of(engine, backward)(engine(*tokens_of(step, 0)))
            launches.append(len(recorder.launches()))
            engine.step()
        units = len(inside.units(engine))
        engine.destroy()
    return launches, units


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_end_of_a_reentrant_backward_is_not_the_end(ranks, stage, backward):
    """G12. Once that is known, each unit is reduced once in a backward, however often backward is entered again."""
    for launches, units in ranks(2).run(
        _launches_of_a_backward, sgd_config(stage=stage, reduce_bucket_size=40), backward
    ):
        assert units > 2
        assert launches[1:] == [units] * 2
        # The first one learns how often gradients arrive: ranks agree on which units came again, and reduce those.
        assert units < launches[0] <= 2 * units + 1


@pytest.mark.parametrize("stage", STAGES)
def test_fewer_reentrant_uses_than_before_are_right(ranks, stage):
    """G12. The number of uses is a maximum that was seen, not one that every backward must reach."""
    runs = ranks(2).run(train_in_engine, repeated(3, 1, 2, 0, 3), sgd_config(stage=stage, reduce_bucket_size=1))
    assert_equal_runs(runs, train_plain(repeated(3, 1, 2, 0, 3), 2))


def test_more_reentrant_uses_than_before_are_refused_by_name(ranks):
    """G12. The gradient is under way already; without overlap it is not."""
    config = sgd_config(stage=1, reduce_bucket_size=1, overlap_comm=False)
    assert_equal_runs(ranks(2).run(train_in_engine, repeated(1, 3), config), train_plain(repeated(1, 3), 2))
    config = sgd_config(stage=1, reduce_bucket_size=1)
    with pytest.raises(AssertionError, match=r"parameter 'layer\.(weight|bias)' received another gradient"):
        ranks(2).run(train_in_engine, repeated(1, 3), config)
