"""activation_checkpointing: the same bits, fewer activations kept; torch's own checkpointing in stage 3."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import partita
import pytest
import torch
import torch.nn.functional as F
from blocks_model import (
    TRANSPORTS,
    Block,
    BlocksModel,
    assert_same_weights,
    batch_of,
    config_for,
    error_of,
    make_blocks,
    run_steps,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STAGES = (0, 1, 2, 3)
KINDS: dict[str, dict[str, Any]] = {
    "found": {},
    "named": {"classes": ["Block"]},
    "on the host": {"cpu_checkpointing": True},
}


class NoisyBlock(Block):
    """With dropout: a recomputation must draw the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.25, self.training)


def checkpointing(**keys: Any) -> dict[str, Any]:
    return {"activation_checkpointing": {"enabled": True, **keys}}


def losses_and_weights(make: Callable[[], nn.Module], config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    return run_steps(make(), config)  # which seeds what dropout draws, as it seeds the weights


# -- the same training


def _same_bits(stage: int, over: str, precision: str) -> None:
    usual = config_for(stage, over, precision)
    for block in (Block, NoisyBlock):
        make = partial(make_blocks, block)
        expected_losses, expected = losses_and_weights(make, usual)
        for keys in KINDS.values():
            names = {**keys, "classes": [block.__name__]} if "classes" in keys else keys
            losses, weights = losses_and_weights(make, {**usual, **checkpointing(**names)})
            assert losses == expected_losses, (block, keys)
            assert_same_weights(weights, expected, f"{block} {keys}")


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointed_layers_train_with_the_same_bits(ranks, stage, over):
    """Found and named layers, inputs on the device and on the host, with dropout and without."""
    ranks(2).run(_same_bits, stage, over, "bf16" if stage % 2 else "fp32")


# -- what is kept


def kept_bytes(engine: partita.Engine) -> int:
    """Memory that a forward keeps for its backward, parameters aside."""
    known = {p.untyped_storage()._cdata for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    tokens, targets = (t.repeat(8, 1) for t in batch_of(0, engine.global_rank))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(tokens, targets)
    total = sum(kept.values())
    engine.backward(loss)
    engine.step()
    return total


class CountingBlock(Block):
    """`calls` of all blocks together."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountingBlock.calls += 1
        return super().forward(x)


def _kept(stage: int, over: str) -> list[tuple[int, int]]:
    found = []
    for keys in ({}, checkpointing()):
        CountingBlock.calls = 0
        engine = partita.Engine(model=make_blocks(CountingBlock), config={**config_for(stage, over), **keys})
        found.append((kept_bytes(engine), CountingBlock.calls))
        engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "over"), [(0, "shared_memory"), (3, "shared_memory"), (3, "torch")])
def test_layers_keep_their_inputs_only_and_are_computed_twice(ranks, stage, over):
    for (usual, calls), (less, more_calls) in ranks(2).run(_kept, stage, over):
        assert less < usual / 2
        assert (calls, more_calls) == (4, 8)


def _evaluates(over: str) -> None:
    CountingBlock.calls = 0
    engine = partita.Engine(model=make_blocks(CountingBlock), config={**config_for(3, over), **checkpointing()})
    engine.eval()
    expected = engine(*batch_of(0, 0)).item()
    with torch.no_grad():
        assert engine(*batch_of(0, 0)).item() == expected
        engine.train()
        assert engine(*batch_of(0, 0)).item() == expected
    assert engine.eval_batch(batch_of(0, 0)).item() == expected
    assert CountingBlock.calls == 4 * 4
    engine.destroy()


@pytest.mark.parametrize("over", TRANSPORTS)
def test_evaluation_is_as_without(ranks, over):
    ranks(2).run(_evaluates, over)


# -- surface


def _refuses() -> list[str]:
    messages = []
    for model, keys in [
        (make_blocks(), {"classes": ["Blok"]}),
        (nn.Linear(3, 3), {}),
        (make_blocks(), {"classes": []}),
    ]:
        config = {**config_for(0), **checkpointing(**keys)}
        messages.append(error_of(lambda m=model, c=config: partita.Engine(model=m, config=c), ValueError))
        assert not any("forward" in vars(module) for module in model.modules())
    return messages


def test_models_without_such_layers_are_refused_by_name(ranks):
    """Promise 7, F1."""
    for unknown, none, empty in ranks(1).run(_refuses):
        assert "activation_checkpointing.classes: the model has no module of class 'Blok'; it has Block, " in unknown
        assert "no repeated layers: name the classes" in none
        assert "no repeated layers" in empty


def _leaves_nothing(over: str, stage: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    config = {**config_for(stage, over, zero={"overlap_gather": True}), **checkpointing()}
    assert "no repeated layers" in error_of(lambda: partita.Engine(model=model, config=config), ValueError)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize("over", TRANSPORTS)
def test_an_engine_that_is_refused_leaves_no_hook(ranks, over):
    """F52: whatever else it would have put on the model."""
    for stage in (1, 3):
        ranks(2).run(_leaves_nothing, over, stage)


def _restores() -> None:
    model = make_blocks()
    before = copy.deepcopy(model)
    given = model.body.blocks[1].forward = partial(Block.forward, model.body.blocks[1])  # as a program may do
    engine = partita.Engine(model=model, config={**config_for(0), **checkpointing()})
    assert all("forward" in vars(block) for block in model.body.blocks)
    engine.destroy()
    assert [module for module in model.modules() if "forward" in vars(module)] == [model.body.blocks[1]]
    assert model.body.blocks[1].forward is given
    assert torch.equal(model(*batch_of(0, 0)), before(*batch_of(0, 0)))
    partita.Engine(model=model, config={**config_for(0), **checkpointing()}).destroy()


def test_destroy_gives_the_layers_their_forward_back(ranks):
    ranks(1).run(_restores)


# -- torch's own, in the user's model


class Adapted(nn.Module):
    """A frozen block with a low-rank adapter beside its first product, as LoRA has."""

    def __init__(self, width: int, scale: nn.Parameter) -> None:
        super().__init__()
        self.base = Block(width, scale).requires_grad_(False)
        scale.requires_grad_(True)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, 2 * width + 1, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        y = self.base.norm(x)
        hidden = self.base.mix(y) + self.up(self.down(y))
        return x + self.base.back(F.gelu(hidden)) * self.base.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Reentrant(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[no-any-return]


class NonReentrant(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsBase(Adapted):
    """Checkpointed is what is inside of the block, not the block."""

    def inner(self, x: Tensor) -> Tensor:
        y = checkpoint(self.base.norm, x, use_reentrant=False)
        hidden = checkpoint(self.base.mix, y, use_reentrant=True) + self.up(self.down(y))
        return x + self.base.back(F.gelu(hidden)) * self.base.scale


def adapted(block: type[Adapted]) -> BlocksModel:
    """Frozen are the blocks' bases and the embedding; the reentrant form needs an input that requires gradients."""
    model = make_blocks(block)
    model.body.norm.requires_grad_(False)
    return model


def _users_own(over: str, precision: str, accumulation: int) -> None:
    changes = {"gradient_accumulation_steps": accumulation}
    expected_losses, expected = run_steps(adapted(Adapted), config_for(0, over, precision, **changes))
    initial = adapted(Adapted).state_dict()
    for block in (Adapted, Reentrant, NonReentrant, CheckpointsBase):
        for stage in (2, 3):
            losses, weights = run_steps(adapted(block), config_for(stage, over, precision, **changes))
            assert losses == expected_losses, (block, stage)
            assert_same_weights(weights, expected, f"{block} in stage {stage}")
    for name, value in initial.items():
        frozen = ".base." in name and "scale" not in name
        if frozen or name.startswith("body.norm"):
            assert torch.equal(expected[name], value.to(expected[name].dtype)), name
        elif ".up." in name:
            assert not torch.equal(expected[name], value.to(expected[name].dtype)), name


@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torchs_checkpointing_with_frozen_layers_and_adapters_trains_as_stage_0(ranks, over, precision):
    """G12: reentrant and not, a shared scale, adapters on a frozen base."""
    ranks(2).run(_users_own, over, precision, 1)
