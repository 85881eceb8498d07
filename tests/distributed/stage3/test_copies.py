"""Copies of a model in training: plain models, which know nothing of the engine and run on one rank alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import inside
import partita
import pytest
import torch
from blocks_model import TRANSPORTS, batch_of, config_for, make_blocks, take_step
from partita.units import holder_of
from partita.zero import GatheredParameters
from torch import nn


def assert_plain(copied: nn.Module) -> None:
    """No hook of the engine is left after a forward; parameters are plain, and nobody's."""
    for module in copied.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
        assert "forward" not in vars(module) or vars(module)["forward"].__self__ is module
    for name, parameter in copied.named_parameters():
        assert type(parameter) is nn.Parameter, name
        assert parameter.is_leaf, name
        assert holder_of(parameter) is None, name
        assert not parameter._post_accumulate_grad_hooks, name


def _evaluates_a_copy(over: str, keys: dict[str, Any], stage: int) -> None:
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(stage, over, **keys))
    take_step(engine, 0)
    with GatheredParameters(model.parameters()):
        with torch.no_grad():
            expected = model(*batch_of(5, 0)).item()
        copies = [copy.deepcopy(model)]
        if not keys:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
    assert inside.gathered_bytes(engine) == 0
    if engine.global_rank == 0:  # alone: any collective would wait for the other rank
        for copied in copies:
            assert copied(*batch_of(5, 0)).item() == expected
            optimizer = torch.optim.SGD(copied.parameters(), lr=0.5)
            copied(*batch_of(5, 0)).backward()  # a model that can be trained by other means
            optimizer.step()
            optimizer.zero_grad()
            assert copied(*batch_of(5, 0)).item() < expected
            assert_plain(copied)
    take_step(engine, 1)
    weights = engine.module_state_dict()
    with GatheredParameters(model.parameters()):
        # The optimizer of the copy has not reached the model.
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    engine.destroy()


@pytest.mark.parametrize("over", TRANSPORTS)
def test_a_copy_runs_on_one_rank_alone(ranks, over):
    """F34: made while the parameters are gathered, evaluated and trained later; by copy and by pickle."""
    ranks(2).run(_evaluates_a_copy, over, {}, 3)
    ranks(2).run(_evaluates_a_copy, over, {"activation_checkpointing": {"enabled": True}}, 3)


def test_a_copy_of_a_model_in_another_stage_is_plain_too(ranks):
    """Hooks that wait for updated parameters are the engine's, as are layers that compute twice."""
    keys = {"activation_checkpointing": {"enabled": True}}
    ranks(2).run(_evaluates_a_copy, "auto", keys, 1)
