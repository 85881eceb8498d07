"""A parameter without an optimizer state has none, also where another one of its unit has it."""

from __future__ import annotations

import partita
import pytest
import torch
from dictated import Dictated, config_for, dictate, take_step
from partita.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state


def _without_a_state(stage: int) -> None:
    """One of two groups has momentum; the other is not answered with zeros."""
    model = Dictated()
    groups = [{"params": [model.a], "momentum": 0.9}, {"params": [model.b, model.c, model.d, model.e]}]
    config = config_for(stage)
    config["zero_optimization"]["reduce_bucket_size"] = 10**6
    engine = partita.Engine(model, torch.optim.SGD(groups, lr=0.1), config=config)
    take_step(engine, dictate(0))
    momentum = safe_get_full_optimizer_state(model.a, "momentum_buffer")
    assert momentum is not None and momentum.any()
    assert safe_get_full_optimizer_state(model.c, "momentum_buffer") is None
    with pytest.raises(KeyError, match=r"no state 'momentum_buffer' of parameter 'c'"):
        safe_set_full_optimizer_state(model.c, torch.ones(33), "momentum_buffer")
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_without_a_state_has_none(ranks, stage):
    ranks(2).run(_without_a_state, stage)
