"""One backward through two engines whose loss scales differ: each engine's gradients are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partita import Engine
from small_models import config, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SGD = {"type": "SGD", "params": {"lr": 0.1}}
BACKWARDS: dict[str, Any] = {
    "engine.backward": lambda engine, loss: engine.backward(loss),
    "engine.scale": lambda engine, loss: engine.scale(loss).backward(),
    "loss.backward": lambda engine, loss: loss.backward(),
}


class Front(nn.Module):
    """`recomputes`: a block of its own backward inside of the backward."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.body[0].weight.dtype)
        if self.recomputes:
            return checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
        return self.body(x)


class Back(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.to(self.out.weight.dtype)).float().pow(2).mean()


def _models(recomputes: bool = False) -> tuple[Front, Back]:
    torch.manual_seed(0)
    return Front(recomputes), Back()


def _settings(power: int | None, **changes: Any) -> dict[str, Any]:
    fp16 = {} if power is None else {"fp16": {"enabled": True, "initial_scale_power": power}}
    return config(optimizer=SGD, **fp16, **changes)


def _norm(model: nn.Module, scale: float) -> float:
    return float(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]).norm()) / scale


def _expected(front_power: int | None, back_power: int | None) -> list[float]:
    front, back = _models()
    if front_power is not None:
        front.half()
    if back_power is not None:
        back.half()
    (back(front(inputs())) * 256).backward()
    return [_norm(front, 256), _norm(back, 256)]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize(("front_power", "back_power"), [(12, 6), (6, 12), (None, 8), (8, None)])
def test_each_engine_has_its_own_gradient(front_power, back_power, kind, recomputes):
    """F11. B.backward(B(A(x))), whoever has a loss scale; again after the scales have moved, and by A alone."""
    front, back = _models(recomputes)
    a, b = Engine(front, config=_settings(front_power)), Engine(back, config=_settings(back_power))
    expected = _expected(front_power, back_power)
    for _ in range(2):
        BACKWARDS[kind](b, b(a(inputs())))
        for engine in (a, b):
            engine.step()
        assert [a.get_global_grad_norm(), b.get_global_grad_norm()] == pytest.approx(expected, rel=2e-3)
        for engine, fresh in zip((a, b), _models(), strict=True):
            engine.load_module_state_dict(fresh.state_dict())
        alone = a(inputs()).float().pow(2).mean()
        BACKWARDS[kind](a, alone)  # nothing is left of the other's scale
        a.step()
        reference = _models()[0]
        if front_power is not None:
            reference.half()
        (reference(inputs()).float().pow(2).mean() * 256).backward()
        assert a.get_global_grad_norm() == pytest.approx(_norm(reference, 256), rel=2e-3)
        a.load_module_state_dict(_models()[0].state_dict())


@pytest.mark.parametrize("kind", ["engine.backward", "engine.scale"])
def test_a_broken_backward_leaves_no_scale(kind):
    """F11. What the other engine does next carries its own."""
    front, back = _models()
    a, b = Engine(front, config=_settings(4)), Engine(back, config=_settings(8))
    hidden = a(inputs())
    hidden.register_hook(_raise)
    with pytest.raises(ZeroDivisionError):
        BACKWARDS[kind](b, b(hidden))
    b.zero_grad()
    a(inputs()).float().pow(2).mean().backward()
    a.step()
    reference = _models()[0].half()
    (reference(inputs()).float().pow(2).mean() * 256).backward()
    assert a.get_global_grad_norm() == pytest.approx(_norm(reference, 256), rel=2e-3)


def _raise(_grad: Tensor) -> None:
    raise ZeroDivisionError("in backward")


def test_two_scaled_losses_in_one_backward_are_refused():
    """F11. No factor takes both scales out of their sum."""
    front, back = _models()
    a, b = Engine(front, config=_settings(4)), Engine(back, config=_settings(8))
    hidden = a(inputs())
    loss = a.scale(hidden.float().pow(2).mean()) + b.scale(b(hidden))
    with pytest.raises(RuntimeError, match=r"scaled by two engines.*sum of the losses"):
        loss.backward()
    a.zero_grad()
    b.zero_grad()
    hidden = a(inputs())
    b.backward(hidden.float().pow(2).mean() + b(hidden))
    a.step()
    b.step()
    front, back = (model.half() for model in _models())
    hidden = front(inputs())
    ((hidden.float().pow(2).mean() + back(hidden)) * 256).backward()
    norms = [a.get_global_grad_norm(), b.get_global_grad_norm()]
    assert norms == pytest.approx([_norm(front, 256), _norm(back, 256)], rel=2e-3)
