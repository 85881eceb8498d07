"""Reduction of gradients while backward goes on: nothing in flight is touched, and it really overlaps."""

from __future__ import annotations

from functools import partial
from typing import Any

import partita
import pytest
import torch
from communicators import RecordingCommunicator, SlowCommunicator, WaitingCommunicator, communicating_through
from gradient_models import CHAIN, LAYERS, WIDTH, Chain
from reference import (
    ODD_MODEL,
    Training,
    assert_equal_runs,
    assert_same_runs,
    numbers,
    one_backward,
    sgd_config,
    three_backwards,
    train_in_engine,
    train_plain,
)
from support import is_mapped, make_model

STAGES = (0, 1, 2, 3)


@pytest.mark.pairwise
@pytest.mark.parametrize("slow", [SlowCommunicator, WaitingCommunicator])
@pytest.mark.parametrize(("accumulation", "micro_batch"), [(1, three_backwards), (3, one_backward)])
@pytest.mark.parametrize("stage", STAGES)
def test_slow_collectives_change_nothing(ranks, stage, accumulation, micro_batch, slow):
    """G1. Overlap on = off = plain PyTorch when every collective ends long after the backward that launched it."""
    config = partial(sgd_config, stage=stage, gradient_accumulation_steps=accumulation)
    training = Training(make_model, micro_batch)
    overlapped = ranks(2).run(train_in_engine, training, config(overlap_comm=True), slow)
    assert_same_runs(overlapped, ranks(2).run(train_in_engine, training, config(overlap_comm=False), slow))
    assert_equal_runs(overlapped, train_plain(training, 2 * accumulation))


@pytest.mark.parametrize("settings", [{"communication_data_type": "fp32"}, {"reduce_scatter": False}])
@pytest.mark.parametrize("stage", STAGES)
def test_slow_collectives_change_nothing_in_staging_buffers(ranks, stage, settings):
    """G1, where the reduced buffer is not the one that gradients are accumulated in."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, bf16={"enabled": True}, **settings)
    config["data_types"] = {"grad_accum_dtype": "bf16"}
    slow = ranks(2).run(train_in_engine, ODD_MODEL, config, WaitingCommunicator)
    assert_same_runs(slow, ranks(2).run(train_in_engine, ODD_MODEL, config))
    assert_equal_runs(slow, train_plain(ODD_MODEL, 4, torch.bfloat16), "bf16")


def _trace(config: dict[str, Any], steps: int) -> list[list[tuple[Any, ...]]]:
    """The events of each step's last backward: collectives, and ("gradient", layer) as autograd computes it."""
    with communicating_through(RecordingCommunicator) as recorder:
        model = Chain()
        engine = partita.Engine(model=model, config=config)
        for i, layer in enumerate(model.layers):
            layer.weight.register_hook(lambda _, i=i: recorder.events.append(("gradient", i)))
        traces = []
        for step in range(steps):
            for i in range(engine.gradient_accumulation_steps()):
                loss = engine(numbers(step, i, 3, WIDTH))
                recorder.events.clear()
                engine.backward(loss)
                traces.append(list(recorder.events))
                engine.step()
        engine.destroy()
    return traces[engine.gradient_accumulation_steps() - 1 :: engine.gradient_accumulation_steps()]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_collectives_start_before_backward_ends(ranks, stage, accumulation):
    """G3. Each unit is launched as soon as its gradient is there, before the next layer's is computed."""
    config = sgd_config(stage=stage, reduce_bucket_size=WIDTH**2, gradient_accumulation_steps=accumulation)
    for traces in ranks(2).run(_trace, config, 3):
        for trace in traces if accumulation > 1 and stage == 2 else traces[1:]:
            order = [event[0] for event in trace if event[0] != "wait"]
            assert order == ["gradient", "launch"] * LAYERS, trace


@pytest.mark.parametrize("stage", STAGES)
def test_backward_does_not_wait_for_collectives(ranks, stage):
    """G3. Overlap must not be a synchronisation in disguise: while backward runs, something is always under way."""
    for traces in ranks(2).run(_trace, sgd_config(stage=stage, reduce_bucket_size=WIDTH**2), 3):
        for trace in traces[1:]:
            kinds = [event[0] for event in trace]
            for i in range(kinds.index("launch") + 1, len(kinds)):
                assert kinds[:i].count("launch") > kinds[:i].count("wait"), trace


@pytest.mark.parametrize("stage", STAGES)
def test_without_overlap_collectives_start_after_backward(ranks, stage):
    """`overlap_comm` false means what it says."""
    for traces in ranks(2).run(_trace, sgd_config(stage=stage, reduce_bucket_size=WIDTH**2, overlap_comm=False), 3):
        for trace in traces:
            kinds = [event[0] for event in trace]
            assert kinds == ["gradient"] * LAYERS + ["launch", "wait"] * LAYERS


def _launches_per_step(config: dict[str, Any], steps: int) -> list[dict[str, int]]:
    """How many of each collective; those on the communicator of gathers are named "... beside"."""
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(model=Chain(), config=config)
        counts = []
        beside = [] if recorder.beside is None else [recorder.beside]
        for step in range(steps):
            for each in (recorder, *beside):
                each.events.clear()
            for i in range(engine.gradient_accumulation_steps()):
                engine.backward(engine(numbers(step, i, 3, WIDTH)))
                engine.step()
            names = [name for name, _ in recorder.launches()] + ["barrier"] * recorder.events.count(("barrier",))
            names += [f"{name} beside" for each in beside for name, _ in each.launches()]
            counts.append({name: names.count(name) for name in set(names)})
        engine.destroy()
    return counts


BUCKETS = {1: LAYERS, WIDTH**2 - 1: LAYERS, WIDTH**2: LAYERS, WIDTH**2 + 1: LAYERS, 2 * WIDTH**2 - 1: LAYERS}
BUCKETS |= {2 * WIDTH**2: 3, 2 * WIDTH**2 + 1: 3, 5 * WIDTH**2: 2, 10**9: 1}


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("stage", STAGES)
def test_collectives_per_step_are_as_planned(ranks, transport, stage, bucket):
    """G7. One per unit (from stage 2 on: and micro-batch), one for the norm, one per unit to gather; always the same.

    In stage 3 a barrier takes the place of the gathers; over torch, each layer is a unit, and is gathered in each
    forward and backward. There the ranks compare in which order they use the layers, once.
    """
    units, accumulation = BUCKETS[bucket], 2
    if stage == 3 and not is_mapped(stage, transport):
        units = LAYERS
    planned = {
        0: {"all_reduce": units + 1},
        1: {"reduce_scatter": units, "all_reduce": 1, "all_gather": units},
        2: {"reduce_scatter": units * accumulation, "all_reduce": 1, "all_gather": units},
        3: {"reduce_scatter": units * accumulation, "all_reduce": 1},
    }
    planned[3] |= {"barrier": 1} if is_mapped(stage, transport) else {"all_gather beside": 2 * units * accumulation}
    config = sgd_config(stage=stage, reduce_bucket_size=bucket, gradient_accumulation_steps=accumulation)
    for first, *counts in ranks(2).run(_launches_per_step, config, 3):
        assert counts == [planned[stage]] * 2
        orders = int(stage == 3 and not is_mapped(stage, transport))
        gathers = planned[stage].get("all_gather beside", 0)
        # The first backward, where it reduces, ends with an agreement on which gradients came late.
        late = {"all_reduce": planned[stage]["all_reduce"] + int(stage >= 2)}
        assert first == planned[stage] | late | ({"all_gather beside": gathers + orders} if orders else {})


@pytest.mark.parametrize("bucket", [1, WIDTH**2 - 1, WIDTH**2, WIDTH**2 + 1, 5 * WIDTH**2])
@pytest.mark.parametrize("stage", STAGES)
def test_any_bucket_size_gives_the_same_weights(ranks, stage, bucket):
    """G7. At, below and above the size of a parameter."""
    config = sgd_config(stage=stage, reduce_bucket_size=bucket, gradient_accumulation_steps=2)
    assert_equal_runs(ranks(2).run(train_in_engine, CHAIN, config), train_plain(CHAIN, 4))


@pytest.mark.parametrize("stage", STAGES)
def test_a_first_parameter_larger_than_the_bucket_has_its_own(ranks, stage):
    """G7. In the odd model every matrix is larger than this bucket, and the vectors share what is left."""
    runs = ranks(2).run(train_in_engine, ODD_MODEL, sgd_config(stage=stage, reduce_bucket_size=60))
    assert_equal_runs(runs, train_plain(ODD_MODEL, 2))
