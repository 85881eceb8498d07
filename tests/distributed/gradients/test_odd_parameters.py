"""Parameters of odd sizes, without elements, unused."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from communicators import GarbageCommunicator, communicating_through
from gradient_models import USES, branches, no_layer_on_rank_1, vectors
from reference import (
    ODD_MODEL,
    PRECISIONS,
    SGD,
    assert_equal_runs,
    assert_same_runs,
    sgd_config,
    train_in_engine,
    train_plain,
)
from support import base_config, whole

STAGES = (0, 1, 2, 3)
ADAM = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


@pytest.mark.pairwise
@pytest.mark.parametrize("sizes", [(1,), (7, 1, 5, 11), (97, 1, 64)], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_sizes_that_ranks_do_not_divide(ranks, stage, world_size, sizes):
    """G8. Also fewer elements than ranks."""
    config = sgd_config(stage=stage, reduce_bucket_size=100)
    runs = ranks(world_size).run(train_in_engine, vectors(*sizes), config)
    assert_equal_runs(runs, train_plain(vectors(*sizes), world_size))


def _state_is_finite(config: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether buffers came full of garbage; whether optimizer states, and then parameters, are finite after steps."""
    with communicating_through(GarbageCommunicator) as garbage:
        engine = partita.Engine(model=ODD_MODEL.make(), config=config)
    for step in range(2):
        for i in range(engine.gradient_accumulation_steps()):
            ODD_MODEL.micro_batch(engine, engine.backward, step, i)
            engine.step()
    states = [moment for by_name in inside.moments(engine) for moment in by_name.values()]
    states += [s["momentum_buffer"] for s in inside.torch_states(engine)]
    with whole(engine):
        finite = [all(bool(t.isfinite().all()) for t in tensors) for tensors in (states, engine.module.parameters())]
    engine.destroy()
    return garbage.filled > 0, *finite


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_never_reaches_a_result(ranks, stage, optimizer, precision):
    """G8. Buffers come full of NaN; weights, norms and states are as if they came full of zeros."""
    config = base_config(
        stage=stage,
        optimizer=optimizer,
        gradient_accumulation_steps=2,
        communication_data_type="fp32",
        gradient_clipping=0.5,
        data_types={"grad_accum_dtype": "fp32" if precision == "fp32" else "bf16"},  # and so through staging buffers
        **PRECISIONS[precision],
    )
    runs = [ranks(3).run(train_in_engine, ODD_MODEL, config, wrap) for wrap in (None, GarbageCommunicator)]
    assert_same_runs(*runs)
    assert ranks(3).run(_state_is_finite, config) == [(True, True, True)] * 3


@pytest.mark.pairwise
@pytest.mark.parametrize("sizes", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0, 5, 0), (5, 0, 0)], ids=str)
@pytest.mark.parametrize(("bucket", "optimizer"), [(1, SGD), (300, ADAM)], ids=["alone", "together"])
@pytest.mark.parametrize("stage", STAGES)
def test_parameters_without_elements(ranks, stage, bucket, optimizer, sizes):
    """G9. First, in the middle, last; in a unit with others and alone."""
    training = vectors(*sizes)
    config = base_config(stage=stage, reduce_bucket_size=bucket, optimizer=optimizer, gradient_accumulation_steps=2)
    runs = ranks(2).run(train_in_engine, training, config)
    assert_equal_runs(runs, train_plain(training, 4, named=optimizer))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("stage", STAGES)
def test_unused_parameters_have_zero_gradients(ranks, stage, use):
    """G11. Unused on one rank, in one micro-batch, in one step or always: no hang, and what a zero gradient gives."""
    training = branches(use, steps=4)
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=31)
    assert_equal_runs(ranks(2).run(train_in_engine, training, config), train_plain(training, 4))


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_any_gradient_takes_part_in_fp16(ranks, stage):
    """G11. There is no gradient on rank 1 whose loss scale could be checked."""
    training = branches(no_layer_on_rank_1)
    runs = ranks(2).run(train_in_engine, training, sgd_config(stage=stage, **PRECISIONS["fp16"]))
    assert_equal_runs(runs, train_plain(training, 2, torch.float16), "fp16")
