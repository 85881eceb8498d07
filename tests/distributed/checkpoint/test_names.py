"""Whatever parameters are called: masters and moments find them, also frozen, tied, wrapped and renamed ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import export, find
from partita.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

WIDTH = 8
ADAM = {"type": "AdamW", "params": {"lr": 0.01}}
SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}


class Net(nn.Module):
    """Two layers of one shape; what the loss makes of them differs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.to(self.a.weight.dtype)))).float().square().mean()


def _wrapped(net: Net) -> None:
    net.b = checkpoint_wrapper(net.b)


def _swapped(net: Net) -> None:
    def swap(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state["a.weight"], state["b.weight"] = state["b.weight"], state["a.weight"]

    net._register_state_dict_hook(swap)


def _left_out(net: Net) -> None:
    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        del state["b.weight"]

    net._register_state_dict_hook(leave_out)


def _tied(net: Net) -> None:
    net.b.weight = net.a.weight


CHANGES: dict[str, Callable[[Net], None]] = {"wrapped": _wrapped, "swapped": _swapped, "left out": _left_out}


def engine_for(seed: int, change: Callable[[Net], Any] | None = None, **config: Any) -> partita.Engine:
    """fp32, stage 0, AdamW, unless the config says otherwise."""
    net = Net(seed)
    if change is not None:
        change(net)
    base = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 0, "optimizer": ADAM}
    return partita.Engine(net, config={**base, **config})


def bf16(master: str = "fp32") -> dict[str, Any]:
    return {"bf16": {"enabled": True, "master_weights": master}}


def stage(number: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, "stage3_param_persistence_threshold": 0}}


def take_steps(engine: partita.Engine, steps: int = 3) -> list[float]:
    losses = []
    for i in range(steps):
        loss = engine(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(i)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def saved(folder: Path, change: Callable[[Net], Any] | None = None, **config: Any) -> dict[str, Tensor]:
    """Three steps and a checkpoint; masters by the names of the state dict, and moments behind "exp_avg "."""
    engine = engine_for(0, change, **config)
    take_steps(engine)
    engine.save_checkpoint(folder, "step")
    state = finest(engine)
    engine.destroy()
    return state


def finest(engine: partita.Engine) -> dict[str, Tensor]:
    names = {id(value): name for name, value in engine.module.state_dict(keep_vars=True).items()}
    state = {}
    for own, parameter in engine.module.named_parameters():
        name = names.get(id(parameter), own)
        for key, value in (
            (name, safe_get_full_fp32_param(parameter)),
            (f"exp_avg {name}", safe_get_full_optimizer_state(parameter, "exp_avg")),
        ):
            assert value is not None
            state[key] = value.clone()
    return state


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in {**one, **other} if name not in one or not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("master", ["fp32", "split"])
@pytest.mark.parametrize("name", CHANGES)
def test_masters_and_moments_have_the_names_of_the_state_dict(tmp_path, name, master):
    """A run with the same names goes on exactly, and so does one whose model is not wrapped; export has the masters."""
    before = saved(tmp_path, CHANGES[name], **bf16(master))
    for change in (CHANGES[name], None) if name == "wrapped" else (CHANGES[name],):
        engine = engine_for(1, change, **bf16(master))
        engine.load_checkpoint(tmp_path)
        assert differences(before, finest(engine)) == []
        engine.destroy()
    sum(export(find(tmp_path, "step"), tmp_path / "out.safetensors", torch.float32))
    weights = load_file(tmp_path / "out.safetensors")
    assert len(weights) == 4 - (name == "left out")
    assert [n for n, value in weights.items() if not torch.equal(value, before[n])] == []
    assert not torch.equal(before["a.weight"], before["a.weight"].bfloat16().float())


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["AdamW", "SGD"])
def test_an_unwrapped_model_goes_on_as_the_wrapped_one(tmp_path, optimizer, waits):
    """With what optimizers keep by parameter: torch's all, the native one how long a parameter stood still."""
    engine = engine_for(0, _wrapped, optimizer=optimizer)
    if waits:
        engine.module.b.requires_grad_(False)
        take_steps(engine, 2)
        engine.module.b.requires_grad_(True)
    take_steps(engine)
    engine.save_checkpoint(tmp_path)
    unbroken = take_steps(engine)
    engine.destroy()
    engine = engine_for(1, optimizer=optimizer)
    engine.load_checkpoint(tmp_path)
    assert take_steps(engine) == unbroken
    engine.destroy()


def test_weights_without_masters_are_told(tmp_path, caplog):
    """What was frozen in bf16 has none; in fp32 it begins from the rounded weights."""
    saved(tmp_path, **bf16())
    frozen = engine_for(0, lambda net: net.a.requires_grad_(False), **bf16())
    take_steps(frozen)
    frozen.save_checkpoint(tmp_path / "frozen")
    frozen.destroy()
    for folder, warned in ((tmp_path, False), (tmp_path / "frozen", True)):
        engine = engine_for(1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "partita"):
            engine.load_checkpoint(folder, load_module_only=True)
        engine.destroy()
        assert ("none of 2 parameters" in caplog.text and "'a.bias'" in caplog.text) == warned


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("master", ["fp32", "split"])
def test_what_is_not_trained_has_the_masters_too(tmp_path, number, master):
    """In fp32, in every stage: frozen parameters, and an engine without an optimizer."""
    before = saved(tmp_path, **bf16(master))
    for change, config in ((lambda net: net.a.requires_grad_(False), {}), (None, {"optimizer": None})):
        engine = engine_for(1, change, **stage(number), **config)
        engine.load_checkpoint(tmp_path, load_module_only=True)
        weights = engine.module_state_dict()
        engine.destroy()
        assert [name for name, value in weights.items() if not torch.equal(value, before[name])] == []


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["AdamW", "SGD"])
def test_an_untied_model_takes_a_tied_checkpoint(tmp_path, optimizer):
    """Both weights begin with the master and the states of the one."""
    engine = engine_for(0, _tied, optimizer=optimizer, **bf16())
    take_steps(engine)
    engine.save_checkpoint(tmp_path)
    key = "exp_avg" if optimizer is ADAM else "momentum_buffer"
    master, state = (
        safe_get_full_fp32_param(engine.module.a.weight),
        safe_get_full_optimizer_state(engine.module.a.weight, key),
    )
    engine.destroy()
    engine = engine_for(1, optimizer=optimizer, **bf16())
    engine.load_checkpoint(tmp_path)
    for parameter in (engine.module.a.weight, engine.module.b.weight):
        assert torch.equal(safe_get_full_fp32_param(parameter), master)
        assert torch.equal(safe_get_full_optimizer_state(parameter, key), state)
    take_steps(engine)
    engine.destroy()
    sum(export(find(tmp_path, None), tmp_path / "out.safetensors", None))
    Net(2).load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
