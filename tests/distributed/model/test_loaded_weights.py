"""Weights that users write into the model after initialize: the next step starts from them."""

from __future__ import annotations

from typing import Any

import partita
import pytest
import torch
from dictated import PRECISIONS, SHAPES, Dictated, config_for, dictate, masters, merged, take_step
from support import load, whole
from torch import Tensor

STAGES = (0, 1, 2, 3)
STILL = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1}},
}
MOVING = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


def _other() -> Dictated:
    """Other weights: no element has the same 16 bits, which would keep the precision of its master."""
    model = Dictated(seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 16
    return model


def _loads_and_stands_still(config: dict[str, Any], steps_before: int) -> dict[str, Tensor]:
    engine = partita.Engine(model=Dictated(), config=config)
    for step in range(steps_before):
        take_step(engine, dictate(step))
    other = _other()
    load(engine, other.state_dict())
    loaded = engine.module_state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name
    for step in range(3):
        take_step(engine, dictate(step))
        for name, value in engine.module_state_dict().items():
            assert torch.equal(value, loaded[name]), f"{name} after step {step} with learning rate 0"
    return masters(engine)


@pytest.mark.pairwise
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", STILL)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_loaded_weights_survive_a_step_with_lr_0(ranks, stage, precision, kind, steps_before):
    """O3: the fp32 masters follow; they are the loaded weights as the parameters' dtype holds them."""
    results = ranks(2).run(_loads_and_stands_still, config_for(stage, precision, optimizer=STILL[kind]), steps_before)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, value in merged(results).items():
        expected = dict(_other().named_parameters())[name].detach().flatten()
        assert torch.equal(value, expected.to(dtype).float()), name


def _trains_from_loaded(config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters of a model that loaded weights after initialize, and of one that was given them."""
    late = partita.Engine(model=Dictated(), config=config)
    weights = {name: p.to(p.dtype) for name, p in _other().state_dict().items()}
    dtype = late.module.a.dtype
    load(late, weights)
    early_model = Dictated()
    early_model.load_state_dict({name: p.to(dtype).float() for name, p in weights.items()})
    early = partita.Engine(model=early_model, config=config)
    for step in range(3):
        take_step(late, dictate(step))
        take_step(early, dictate(step))
    return masters(late), masters(early)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_loaded_weights(ranks, stage, precision):
    """O3: the same bits as when the model had them before initialize."""
    for late, early in ranks(2).run(_trains_from_loaded, config_for(stage, precision, optimizer=MOVING)):
        for name, value in early.items():
            assert torch.equal(late[name].view(torch.int32), value.view(torch.int32)), name


def _writes_one_element(config: dict[str, Any], write: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters before and after a step with lr 0 that follows a write."""
    engine = partita.Engine(model=Dictated(), config=config)
    take_step(engine, dictate(0))
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    before = masters(engine)
    if write == "one element":
        with torch.no_grad(), whole(engine, engine.module.e):
            engine.module.e[3] = 5.0
    elif write == "the same weights":
        load(engine, engine.module_state_dict())
    else:  # an average for evaluation, and back
        own = engine.module_state_dict()
        load(engine, _other().state_dict())
        engine.eval_batch((dictate(0),))
        load(engine, own)
    take_step(engine, dictate(1))
    return before, masters(engine)


@pytest.mark.pairwise
@pytest.mark.parametrize("write", ["one element", "the same weights", "swapped and back"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_masters_of_unchanged_elements_keep_their_precision(ranks, stage, precision, write):
    """O3: only elements that are not their master rounded any more were written."""
    results = ranks(2).run(_writes_one_element, config_for(stage, precision, optimizer=MOVING), write)
    before, after = (merged([r[i] for r in results]) for i in (0, 1))
    if write == "one element":
        before["e"][3] = 5.0
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def _rewritten_before_a_skipped_step(config: dict[str, Any]) -> dict[str, Tensor]:
    engine = partita.Engine(model=Dictated(), config=config)
    with torch.no_grad(), whole(engine, engine.module.e):
        engine.module.e.fill_(3.0)
    bad = {name: grad * float("nan") for name, grad in dictate(0).items()}
    take_step(engine, bad)
    assert engine.skipped_steps == 1
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    take_step(engine, dictate(0))
    with whole(engine):
        return {"e": engine.module.e.detach().float().clone()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_written_before_a_skipped_step_stay(ranks, stage, precision):
    """O3, N1: also when the first step after the write is skipped."""
    for weights in ranks(2).run(_rewritten_before_a_skipped_step, config_for(stage, precision, optimizer=MOVING)):
        assert torch.equal(weights["e"], torch.full(SHAPES["e"], 3.0))


def _from_nobody(config: dict[str, Any]) -> None:
    engine = partita.Engine(model=Dictated(), config=config)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=rf"rank = {rank}: the group has the ranks 0 to 1"):
            engine.load_module_state_dict(_other().state_dict(), rank=rank)
    engine.destroy()


def test_weights_of_a_rank_that_does_not_exist_are_refused(ranks):
    ranks(2).run(_from_nobody, config_for(1, optimizer=MOVING))
