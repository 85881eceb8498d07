"""What a checkpoint cannot name or a model cannot take is refused by name; buffers of a rank's own stay its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import CheckpointError
from torch import Tensor, nn

WIDTH = 8
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


class Net(nn.Module):
    def __init__(self, seed: int, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).square().mean()


def engine_for(model: nn.Module, optimizer: Any = None) -> partita.Engine:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 0}
    return partita.Engine(model, optimizer=optimizer, config=config | ({} if optimizer else ADAM))


def take_step(engine: partita.Engine) -> None:
    engine.backward(engine(torch.ones(2, WIDTH)))
    engine.step()


def save(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint after a step; the weights."""
    engine = engine_for(model)
    take_step(engine)
    engine.save_checkpoint(folder, "step")
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


class Caches(Net):
    """Buffers that no state dict has: one is made in forward, and sizes follow the rank and the forwards so far."""

    def __init__(self, seed: int, own: int) -> None:
        super().__init__(seed)
        self.own = own
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mask = torch.ones(3 + self.own)
        self.cache = torch.arange(float(len(self.cache) + 5 * self.own + 1))
        return super().forward(x)


def _caches(folder: str) -> bool:
    engine = engine_for(Caches(0, 0))
    rank = engine.global_rank
    engine.module.own = rank
    take_step(engine)
    engine.save_checkpoint(folder, "step")
    weights = engine.module_state_dict()
    engine.destroy()
    engine = engine_for(Caches(1, 0))
    engine.module.cache.fill_(rank)
    engine.load_checkpoint(folder, "step")
    fits = all(torch.equal(weights[name], value) for name, value in engine.module_state_dict().items())
    kept = engine.module.mask is None and engine.module.cache.tolist() == [rank, rank]
    engine.destroy()
    return fits and kept


def test_buffers_that_no_state_dict_has_stay_a_ranks_own(ranks, tmp_path):
    assert ranks(2).run(_caches, str(tmp_path)) == [True, True]


class ExtraState(Net):
    def get_extra_state(self) -> Tensor:
        return torch.arange(3.0)

    def set_extra_state(self, state: Any) -> None: ...


def _hooked(change: Callable[[dict[str, Any]], None]) -> Net:
    model = Net(0)
    model._register_state_dict_hook(lambda module, state, prefix, _: change(state))
    return model


def _cloned(state: dict[str, Any]) -> None:
    state["body.weight"] = state["body.weight"].detach().clone()


def _fused(state: dict[str, Any]) -> None:
    state["fused"] = torch.cat([state.pop("body.weight"), state.pop("head.weight")])


MADE: dict[str, Callable[[], tuple[nn.Module, str]]] = {
    "extra state": lambda: (ExtraState(0), "'_extra_state' in the model's state dict is neither"),
    "a clone": lambda: (_hooked(_cloned), "'body.weight' in the model's state dict is neither"),
    "fused": lambda: (_hooked(_fused), "'fused' in the model's state dict is neither"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_neither_parameter_nor_buffer_is_refused(tmp_path, name):
    """On both ways, and nothing is left in the folder."""
    model, words = MADE[name]()
    engine = engine_for(model)
    with pytest.raises(CheckpointError, match=words):
        engine.save_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, Net(0))
    with pytest.raises(CheckpointError, match=words):
        engine.load_checkpoint(tmp_path)
    take_step(engine)
    engine.destroy()


def test_parameters_that_come_and_go_are_refused(tmp_path):
    engine = engine_for(Net(0))
    engine.module.extra = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"'extra.weight' was added to the model"):
        engine.save_checkpoint(tmp_path)
    del engine.module.extra
    engine.save_checkpoint(tmp_path)
    engine.module.head = nn.Linear(WIDTH, 3)
    with pytest.raises(CheckpointError, match=r"'head.weight' was added to the model, or replaced"):
        engine.save_checkpoint(tmp_path)
    del engine.module.head
    with pytest.raises(CheckpointError, match=r"'head.bias' was taken from the model"):
        engine.save_checkpoint(tmp_path)
    engine.destroy()


class Momentum(torch.optim.Optimizer):
    """Keeps its momentum under a key of the caller's."""

    def __init__(self, parameters: Any, key: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.key = key

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            state.setdefault(self.key, torch.zeros_like(parameter)).mul_(0.9).add_(parameter.grad)
            parameter.add_(state[self.key], alpha=-0.1)


def _saved_with(folder: str, key: Any) -> str:
    model = Net(0)
    engine = engine_for(model, Momentum(model.parameters(), key))
    take_step(engine)
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", ["weight", "remainder", "parameter", "a/b", 0, ""], ids=repr)
def test_an_optimizers_keys_are_told_from_ours(tmp_path, key):
    assert f"under {key!r}" in _saved_with(str(tmp_path), key)
    assert list(tmp_path.iterdir()) == []


def test_ranks_refuse_a_key_together(ranks, tmp_path):
    """Also those that have no part of a parameter of the optimizer."""
    first, *others = ranks(3).run(_saved_with, str(tmp_path), "weight")
    assert "under 'weight'" in first and others == [first] * 2
    assert ranks(3).run(_saved_with, str(tmp_path), "buffer") == [""] * 3


def _with_buffer(seed: int, make: Callable[[], Tensor]) -> Net:
    model = Net(seed)
    model.register_buffer("extra", make())
    return model


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


def test_a_buffer_that_takes_nothing_is_refused_before_anything_changes(tmp_path):
    """Also when it is saved."""
    save(tmp_path, _with_buffer(0, lambda: torch.ones(3)))
    for make in (_inference, lambda: torch.zeros(1).expand(3), lambda: torch.zeros(3).to_sparse()):
        engine = engine_for(_with_buffer(1, lambda: torch.zeros(3)))
        engine.module.extra = make()
        before = {name: value.clone() for name, value in engine.module.named_parameters()}
        with pytest.raises(CheckpointError, match=r"buffer 'extra' .* cannot be loaded into it"):
            engine.load_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=r"buffer 'extra' .* cannot be loaded into it"):
            engine.save_checkpoint(tmp_path / "another")
        assert not list((tmp_path / "another").glob("*"))
        assert all(torch.equal(before[name], value) for name, value in engine.module.named_parameters())
        engine.destroy()


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "a gradient": lambda: torch.arange(3.0).requires_grad_(),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    **{str(t): lambda t=t: torch.arange(3.0).to(t) for t in (torch.complex64, torch.uint16, torch.float8_e5m2)},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", BUFFERS)
def test_odd_buffers_come_back(tmp_path, name):
    """Also in a program's inference_mode()."""
    values = BUFFERS[name]()
    save(tmp_path, _with_buffer(0, BUFFERS[name]))
    engine = engine_for(_with_buffer(1, lambda: torch.zeros_like(values).requires_grad_(values.requires_grad)))
    with torch.inference_mode():
        engine.load_checkpoint(tmp_path)
    found = engine.module.extra
    assert found.dtype == values.dtype and found.tolist() == values.tolist()
    take_step(engine)
    engine.destroy()


class Inner(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = Net(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_load_that_leaves_out_says_so(tmp_path, caplog):
    weights = save(tmp_path, _with_buffer(0, lambda: torch.ones(3)))
    model = Net(1, outputs=4)
    model.register_buffer("mine", torch.ones(2))
    engine = engine_for(model)
    with caplog.at_level(logging.WARNING, "partita"):
        engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(engine.module_state_dict()["body.weight"], weights["body.weight"])
    engine.destroy()
    for words in (
        "1 only in the model: 'mine'",
        "1 only in the checkpoint: 'extra'",
        "2 of another shape: 'head.weight'",
    ):
        assert words in caplog.text
    caplog.clear()
    save(tmp_path, Net(0))
    engine = engine_for(Net(1))
    with caplog.at_level(logging.WARNING, "partita"):
        engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert "differ" not in caplog.text
    engine.destroy()


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrapper_is_recognised(tmp_path, strict):
    """On either side; of which nothing fits is refused in any case."""
    save(tmp_path / "bare", Net(0))
    save(tmp_path / "inner", Inner(0))
    for folder, model, words in (
        ("bare", Inner(1), r"All names here begin with 'inner\.'"),
        ("bare", torch.compile(Net(1), backend="eager"), r"All names here begin with '_orig_mod\.'"),
        ("inner", Net(1), r"All names of the checkpoint begin with 'inner\.'"),
    ):
        engine = engine_for(model)
        with pytest.raises(CheckpointError, match=words):
            engine.load_checkpoint(tmp_path / folder, load_module_strict=strict)
        engine.destroy()
