"""Weights that a program writes through `.data`, which autograd does not count."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from late_streams import on_late_streams
from no_waits import refusing_host_waits
from partita import Engine
from small_models import assert_same_weights, config, inputs, seeded, weights
from torch import nn

STAGES = (0, 1, 2)


def _clip(model: nn.Module, through_data: bool) -> None:
    """As for a Wasserstein critic."""
    for parameter in model.parameters():
        if through_data:
            parameter.data.clamp_(-0.2, 0.2)
        else:
            with torch.no_grad():
                parameter.clamp_(-0.2, 0.2)


def _run(through_data: bool, stage: int, changes: dict[str, Any], late: bool = False) -> dict[str, torch.Tensor]:
    zero = {"stage": stage, **changes.get("zero_optimization", {})}
    with on_late_streams() if late else nullcontext():
        engine = Engine(seeded(), config=config(**{**changes, "zero_optimization": zero}))
    for step in range(6):
        with refusing_host_waits() if late and step else nullcontext():  # the first step has agreements
            engine.train_batch(inputs(step))
        _clip(engine.module, through_data)
    return weights(engine.module)


SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_writes_after_every_step_are_noticed(setting, stage, caplog):
    """F15. They count as those that autograd has seen, and a warning says once what to write instead."""
    if setting == "offload" and stage == 0:
        pytest.skip("stage 0 offloads nothing")
    expected = _run(False, stage, SETTINGS[setting])
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "partita"):
        found = _run(True, stage, SETTINGS[setting])
    assert_same_weights(found, expected)
    (record,) = [r for r in caplog.records if ".data" in r.message]
    assert "no_grad()" in record.message
    assert max(p.abs().max().item() for p in found.values()) <= 0.21


@pytest.mark.parametrize("setting", ["bf16", "fp16"])
def test_on_a_device_that_is_not_waited_for_the_masters_take_them_all_the_same(setting, caplog):
    """The host learns of the writes with the next update, and then warns."""
    with caplog.at_level(logging.WARNING, "partita"):
        expected, found = (_run(True, 1, SETTINGS[setting], late) for late in (False, True))
    assert_same_weights(found, expected, 0.0)
    usual, late = (r.getMessage() for r in caplog.records if ".data" in r.message)
    assert late == usual


def test_split_masters_follow_their_parameters(caplog):
    """F15. They are what a parameter lacks of its weight, so a write is half a rounding off at the most."""
    split = {"bf16": {"enabled": True, "master_weights": "split"}}
    assert_same_weights(_run(True, 1, split), _run(False, 1, split), 2e-3)


def test_a_model_that_nobody_writes_is_not_warned_of(caplog):
    """F15. Not even one whose weights are not numbers any more."""
    engine = Engine(seeded(), config=config(bf16={"enabled": True}))
    with torch.no_grad():
        engine.module.first.weight.fill_(float("nan"))
    for step in range(4):
        engine.backward(engine(inputs(step)))
        engine.step()
    assert [r for r in caplog.records if ".data" in r.message] == []
