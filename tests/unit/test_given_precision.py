"""A model that the program has made 16-bit itself, and a config that is silent about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from partita import Engine
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor, nn


class Mixed(Regression):
    """Its modules may have types of their own."""

    def predict(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.second(hidden.to(self.second.weight.dtype))


def _first_half(model: Mixed) -> Mixed:
    model.first.half()
    return model


def _first_bf16(model: Mixed) -> Mixed:
    model.first.bfloat16()
    return model


GIVEN: dict[str, tuple[Callable[[Mixed], nn.Module], float, str]] = {
    # (what the program does, the loss scale, what the log says)
    "half": (lambda m: m.half(), 2.0**16, "fp16 parameters"),
    "bfloat16": (lambda m: m.bfloat16(), 1.0, "bf16 parameters"),
    "half in part": (_first_half, 2.0**16, "fp16 parameters"),
    "bfloat16 in part": (_first_bf16, 1.0, "bf16 parameters"),
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("given", GIVEN)
def test_a_16_bit_model_is_trained_as_it_is_and_that_is_said(given, stage, caplog):
    """F16. fp32 masters, and for fp16 the dynamic loss scale that its section has by default."""
    convert, scale, says = GIVEN[given]
    with caplog.at_level(logging.INFO, "partita"):
        engine = Engine(convert(seeded(Mixed)), config=config(zero_optimization={"stage": stage}))
    assert engine.loss_scale == scale
    assert [r.message for r in caplog.records if says in r.message and "no precision" in r.message] != []
    dtypes = [p.dtype for p in engine.module.parameters()]
    for step in range(3):
        engine.train_batch(inputs(step))
    assert [p.dtype for p in engine.module.parameters()] == dtypes
    assert engine.skipped_steps == 0


@pytest.mark.parametrize(("given", "section"), [("half", "fp16"), ("bfloat16", "bf16")])
def test_the_numbers_are_those_of_the_section(given, section):
    """F16. Bit for bit, as the weights are 16-bit ones at the start."""
    silent = Engine(GIVEN[given][0](seeded(Mixed)), config=config())
    asked = Engine(GIVEN[given][0](seeded(Mixed)), config=config(**{section: {"enabled": True}}))
    for step in range(5):
        for engine in (silent, asked):
            engine.train_batch(inputs(step))
    assert_same_weights(weights(silent.module), weights(asked.module))
    assert silent.loss_scale == asked.loss_scale


def test_small_gradients_of_a_half_model_do_not_underflow():
    """F16. Without a loss scale their step would be zero."""
    engine = Engine(seeded(Mixed).half(), config=config())
    engine.backward(engine(inputs()) * 1e-6)
    engine.step()
    reference = seeded(Mixed)
    (reference(inputs()) * 1e-6).backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    assert engine.get_global_grad_norm() == pytest.approx(norm, rel=0.02)


def test_frozen_half_layers_scale_the_loss_too():
    """F16. Gradients pass through them on their way to fp32 adapters."""
    model = seeded(Mixed)
    model.second.half().requires_grad_(False)
    engine = Engine(model, config=config())
    assert engine.loss_scale == 2.0**16
    before = weights(model)
    engine.train_batch(inputs())
    assert torch.equal(weights(model)["second.weight"], before["second.weight"])


@pytest.mark.parametrize("asked", [{"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}])
def test_a_section_decides_where_there_is_one(asked: dict[str, Any], caplog):
    """F16. The whole model is converted, and nothing is said."""
    with caplog.at_level(logging.INFO, "partita"):
        engine = Engine(_first_half(seeded(Mixed)), config=config(**asked))
    assert len({p.dtype for p in engine.module.parameters()}) == 1
    assert "no precision" not in caplog.text
