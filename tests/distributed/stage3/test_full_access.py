"""`partita.utils`: whole weights, gradients and optimizer states to look at and to change, in every stage."""

from __future__ import annotations

from typing import Any

import partita
import pytest
import torch
from blocks_model import (
    ADAM,
    SGD,
    TRANSPORTS,
    assert_same_weights,
    batch_of,
    config_for,
    error_of,
    make_blocks,
    take_step,
)
from partita.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

PLACES = [(0, "torch"), (1, "shared_memory"), (2, "torch"), (3, "shared_memory"), (3, "torch")]
in_every_stage = pytest.mark.parametrize(("stage", "path"), PLACES)
OPTIMIZERS = {"Adam": (ADAM, ("exp_avg", "exp_avg_sq")), "SGD": (SGD, ("momentum_buffer",))}
KINDS = [(o, p) for o in OPTIMIZERS for p in ("fp32", "bf16", "fp16", "split") if (o, p) != ("SGD", "split")]


def _engine(stage: int, transport: str, optimizer: str, precision: str) -> partita.Engine:
    model = make_blocks(blocks=2)
    model.body.norm.requires_grad_(False)
    config = config_for(stage, transport, precision, optimizer=OPTIMIZERS[optimizer][0])
    return partita.Engine(model=model, config=config)


def _changed(value: Tensor, seed: int) -> Tensor:
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))
    return value * 0.5 + noise * 0.01


def _read_and_changed(stage: int, transport: str, optimizer: str, precision: str) -> dict[str, Tensor]:
    """All that can be read in two steps, with changes in between, and the weights afterwards."""
    engine = _engine(stage, transport, optimizer, precision)
    named = dict(engine.module.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    seen: dict[str, Tensor] = {}

    def read(when: str) -> None:
        for name, p in trained.items():
            values = {"weight": safe_get_full_fp32_param(p), "grad": safe_get_full_grad(p)}
            values.update({key: safe_get_full_optimizer_state(p, key) for key in OPTIMIZERS[optimizer][1]})
            for what, value in values.items():
                if value is not None:
                    assert value.shape == p.shape and value.dtype == torch.float32, f"{what} of {name}"
                    seen[f"{when}: {what} of {name}"] = value

    read("at the start")
    engine.backward(engine(*batch_of(0, engine.global_rank)))
    read("after backward")
    some = [p for i, p in enumerate(trained.values()) if i % 2]
    for i, p in enumerate(some):
        grad = safe_get_full_grad(p)
        assert grad is not None
        safe_set_full_grad(p, _changed(grad, i))
    read("with other gradients")
    engine.step()
    read("after the step")
    for i, p in enumerate(some):
        weight = safe_get_full_fp32_param(p)
        assert weight is not None
        safe_set_full_fp32_param(p, _changed(weight, i))
        for key in OPTIMIZERS[optimizer][1]:
            state = safe_get_full_optimizer_state(p, key)
            assert state is not None
            safe_set_full_optimizer_state(p, _changed(state, i), key)
    read("changed")
    take_step(engine, 1)
    read("after another step")
    return {**seen, **engine.module_state_dict()}


@pytest.mark.pairwise
@in_every_stage
@pytest.mark.parametrize(("optimizer", "precision"), KINDS)
def test_what_is_read_and_changed_is_that_of_stage_0(ranks, optimizer, precision, stage, path):
    """Weights, gradients and states, before and after changes, and the steps that follow."""
    expected = ranks(2).run(_read_and_changed, 0, "shared_memory", optimizer, precision)
    for values, others in zip(
        ranks(2).run(_read_and_changed, stage, path, optimizer, precision), expected, strict=True
    ):
        assert_same_weights(values, others)
        states = [name for name in values if name.startswith("after the step")]
        assert len(states) == 14 * (1 + len(OPTIMIZERS[optimizer][1]))  # no gradients then


def _follows_torch(stage: int, transport: str, optimizer: str) -> None:
    """The same in plain PyTorch on the batches of both ranks."""
    engine = _engine(stage, transport, optimizer, "fp32")
    plain = make_blocks(blocks=2)
    plain.body.norm.requires_grad_(False)
    named = OPTIMIZERS[optimizer][0]
    torchs = getattr(torch.optim, named["type"])((p for p in plain.parameters() if p.requires_grad), **named["params"])
    parameters = dict(engine.module.named_parameters())
    for step in range(3):
        engine.backward(engine(*batch_of(step, engine.global_rank)))
        torchs.zero_grad()
        for rank in range(2):
            (plain(*batch_of(step, rank)) / 2).backward()
        for i, (name, p) in enumerate(plain.named_parameters()):
            if not p.requires_grad:
                continue
            torch.testing.assert_close(safe_get_full_grad(parameters[name]), p.grad, rtol=1e-4, atol=1e-6)
            if i % 2:
                p.grad = _changed(p.grad, i)
                safe_set_full_grad(parameters[name], p.grad)
        engine.step()
        torchs.step()
        for i, (name, p) in enumerate(plain.named_parameters()):
            if not p.requires_grad:
                continue
            ours = parameters[name]
            torch.testing.assert_close(safe_get_full_fp32_param(ours), p.detach(), rtol=1e-3, atol=1e-5)
            for key in OPTIMIZERS[optimizer][1]:
                state = torchs.state[p][key]
                torch.testing.assert_close(safe_get_full_optimizer_state(ours, key), state, rtol=1e-3, atol=1e-6)
                if i % 3 == 0:
                    state.copy_(_changed(state, i))
                    safe_set_full_optimizer_state(ours, state, key)
            if i % 3 == 1:
                with torch.no_grad():
                    p.copy_(_changed(p, i))
                safe_set_full_fp32_param(ours, p.detach())


@in_every_stage
def test_values_are_those_of_torch(ranks, stage, path):
    """The mean gradient before clipping, the weights and moments: read and changed in every step."""
    for optimizer in OPTIMIZERS:
        ranks(2).run(_follows_torch, stage, path, optimizer)


def _nothing_there(stage: int, transport: str) -> None:
    engine = _engine(stage, transport, "Adam", "bf16")
    model: Any = engine.module
    weight, frozen, plain = model.body.blocks[0].mix.weight, model.body.norm.weight, nn.Parameter(torch.ones(3))
    for parameter in (frozen, plain):
        value = torch.ones(parameter.shape)
        assert safe_get_full_fp32_param(parameter) is None
        assert safe_get_full_grad(parameter) is None
        assert safe_get_full_optimizer_state(parameter, "exp_avg") is None
        for change in (
            lambda p=parameter, v=value: safe_set_full_fp32_param(p, v),
            lambda p=parameter, v=value: safe_set_full_grad(p, v),
            lambda p=parameter, v=value: safe_set_full_optimizer_state(p, v, "exp_avg"),
        ):
            assert "no engine trains this parameter" in error_of(change, ValueError)
    value = torch.ones(weight.shape)
    assert safe_get_full_grad(weight) is None  # before the first backward
    assert safe_get_full_optimizer_state(weight, "momentum_buffer") is None
    assert "no gradient to replace" in error_of(lambda: safe_set_full_grad(weight, value), RuntimeError)
    assert "'momentum_buffer'" in error_of(
        lambda: safe_set_full_optimizer_state(weight, value, "momentum_buffer"), KeyError
    )
    for change in (
        lambda: safe_set_full_fp32_param(weight, value.t()),
        lambda: safe_set_full_grad(weight, value.t()),
        lambda: safe_set_full_optimizer_state(weight, value[0], "exp_avg"),
    ):
        error = error_of(change, ValueError)
        assert "'body.blocks.0.mix.weight' has shape (15, 7), the value" in error
    take_step(engine, 0)
    assert safe_get_full_grad(weight) is None  # after the step
    copy = safe_get_full_fp32_param(weight)
    assert copy is not None
    kept = copy.clone()
    copy.zero_()  # a copy: the engine's is as it was
    assert torch.equal(safe_get_full_fp32_param(weight), kept)  # type: ignore[arg-type]
    engine.destroy()
    assert safe_get_full_optimizer_state(weight, "exp_avg") is None
    assert "no engine" in error_of(lambda: safe_set_full_fp32_param(weight, value), ValueError)


@in_every_stage
def test_what_is_not_there_is_none_and_cannot_be_changed(ranks, stage, path):
    """Frozen parameters, those of nobody, before a backward, after a step, after destroy()."""
    ranks(2).run(_nothing_there, stage, path)


def _unfinished(stage: int) -> None:
    model = make_blocks(blocks=2)
    engine = partita.Engine(model=model, config=config_for(stage, gradient_accumulation_steps=2))
    engine.backward(engine(*batch_of(0, engine.global_rank)))
    if stage < 2:
        error = error_of(lambda: safe_get_full_grad(model.body.scale), RuntimeError)
        assert "unfinished accumulation" in error
    engine.step()
    engine.backward(engine(*batch_of(1, engine.global_rank)))
    grad = safe_get_full_grad(model.body.scale)
    expected = make_blocks(blocks=2)
    for step in range(2):
        for rank in range(2):
            (expected(*batch_of(step, rank)) / 4).backward()
    torch.testing.assert_close(grad, expected.body.scale.grad, rtol=1e-4, atol=1e-6)
    engine.step()


def test_gradients_of_an_unfinished_accumulation(ranks):
    """Stages 0 and 1 have not reduced them; at the end they are the mean over micro-batches and ranks."""
    for stage in range(4):
        ranks(2).run(_unfinished, stage)


def test_no_transport_is_missing():
    """Stage 3 is looked into on both."""
    assert {path for stage, path in PLACES if stage == 3} == set(TRANSPORTS)
