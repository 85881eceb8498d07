"""Hooks of an optimizer's step, and the optimizer that `initialize()` returns, as programs of torch use them."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import partita
import pytest
import torch
from pairwise import pairwise
from partita.zero import GatheredParameters
from small_models import Regression, assert_same_weights, config, inputs, seeded, weights
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05}),
    "Adam": (torch.optim.Adam, {"lr": 0.05}),
    "FusedAdam": (partita.optim.FusedAdam, {"lr": 0.05}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}
STEPS = 4


class Average:
    """Of the weights after each step."""

    def __init__(self, model: nn.Module, partitioned: bool = False) -> None:
        self.model = model
        self.partitioned = partitioned
        self.sums: dict[str, Tensor] = {}
        self.order: list[str] = []

    def add(self, *_: Any) -> None:
        with GatheredParameters(self.model.parameters(), enabled=self.partitioned):
            for name, p in self.model.named_parameters():
                self.sums[name] = self.sums.get(name, 0) * 0.5 + p.detach().float()
        self.order.append("post")

    def before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert args[0] is optimizer
        self.order.append("pre")
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def _register(where: str, given: Any, returned: Any, average: Average) -> list[Any]:
    if where == "global":
        return [register_optimizer_step_pre_hook(average.before), register_optimizer_step_post_hook(average.add)]
    optimizer = given if where == "given" else returned
    return [optimizer.register_step_pre_hook(average.before), optimizer.register_step_post_hook(average.add)]


def _plain(kind: str, world_size: int, where: str) -> tuple[dict[str, Tensor], list[str], dict[str, Tensor]]:
    make, options = OPTIMIZERS[kind]
    if make is partita.optim.FusedAdam:
        make = torch.optim.AdamW
        options = {**options, "weight_decay": 0.0}
    model = seeded()
    optimizer = make(model.parameters(), **options)
    average = Average(model)
    hooks = _register(where, optimizer, optimizer, average)
    for step in range(STEPS):
        torch.stack([model(inputs(step + 50 * rank)) for rank in range(world_size)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return average.sums, average.order, weights(model)


def _compare(cases: list[tuple[Any, ...]]) -> None:
    for kind, stage, where, overlap in cases:
        make, options = OPTIMIZERS[kind]
        model = seeded()
        given = make(model.parameters(), **options)
        zero = {
            "stage": stage,
            "reduce_bucket_size": 10,
            "stage3_param_persistence_threshold": 0,
            "overlap_gather": overlap and stage in (1, 2),
        }
        engine, returned, *_ = partita.initialize(model, given, config=config(optimizer=None, zero_optimization=zero))
        average = Average(model, partitioned=stage == 3)
        hooks = _register(where, given, returned, average)
        for step in range(STEPS):
            engine.backward(engine(inputs(step + 50 * engine.global_rank)))
            engine.step()
        for hook in hooks:
            hook.remove()
        sums, order, expected = _plain(kind, engine.world_size, where)
        state = engine.module_state_dict()
        engine.destroy()
        case = f"{kind}, stage {stage}, {where}, {overlap}"
        assert average.order == order == ["pre", "post"] * STEPS, case
        try:
            assert_same_weights(average.sums, sums, 1e-5)
            assert_same_weights(state, expected, 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("world_size", [1, 2])
def test_hooks_run_around_the_step_as_in_torch(ranks, world_size):
    """F13. Also on the native path: an average of whole weights, and a learning rate that a hook sets."""
    cases = pairwise(product(OPTIMIZERS, (0, 1, 2, 3), ("given", "returned", "global"), (False, True)))
    ranks(world_size).run(_compare, cases)


def _engine(kind: str = "AdamW", **changes: Any) -> partita.Engine:
    make, options = OPTIMIZERS[kind]
    model = seeded()
    return partita.Engine(model, make(model.parameters(), **options), config=config(optimizer=None, **changes))


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_no_hook_runs_in_a_skipped_step(kind):
    """F13. As with torch's GradScaler."""
    engine = _engine(kind, fp16={"enabled": True, "initial_scale_power": 4})
    ran: list[int] = []
    engine.optimizer.register_step_pre_hook(lambda *_: ran.append(engine.global_steps))
    engine.optimizer.register_step_post_hook(lambda *_: ran.append(engine.global_steps))
    for factor in (1.0, float("inf"), 1.0):
        engine.backward(engine(inputs()) * factor)
        engine.step()
    assert engine.skipped_steps == 1
    assert ran == [0, 0, 2, 2]


class InterruptionError(Exception):
    """Raised by a hook of the program."""


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_training_goes_on_after_a_hook_has_raised(kind, when):
    """After a pre-hook's error no step was taken, and it is taken again; after a post-hook's it was, and counts."""
    engine = _engine(kind)
    raises = [True]

    def hook(*_: Any) -> None:
        if raises.pop():
            raise InterruptionError

    register = getattr(engine.optimizer, f"register_step_{when}_hook")
    for step in range(STEPS):
        if step == 1:
            removable = register(hook)
        engine.backward(engine(inputs(step)))
        if step == 1:
            with pytest.raises(InterruptionError):
                engine.step()
            removable.remove()
            if when == "pre":
                engine.backward(engine(inputs(step)))
                engine.step()
        else:
            engine.step()
    make, options = OPTIMIZERS[kind]
    model = seeded()
    optimizer = make(model.parameters(), **options)
    for step in range(STEPS):
        for _ in range(2 if step == 1 and when == "pre" else 1):  # no step has dropped the gradients of the first one
            model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.global_steps == STEPS
    assert_same_weights(weights(engine.module), weights(model), 1e-5)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_pre_hook_may_change_the_arguments(kind):
    """F13. Post hooks see what it made of them; anything but (args, kwargs) is refused."""
    engine = _engine(kind)
    seen: list[Any] = []
    first = engine.optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": None}))
    engine.optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append((args[1:], kwargs)))
    engine.train_batch(inputs())
    assert seen == [((), {"closure": None})]
    first.remove()
    engine.optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="pre-hook returned 3"):
        engine.train_batch(inputs())


# -- the optimizer that a program gets


class Mine(torch.optim.SGD):
    """A class of the user's."""


def test_the_returned_optimizer_is_one_of_the_users_class():
    """Libraries ask for it, and look at its groups: with the model's parameters, whatever runs inside."""
    model = seeded()
    engine, optimizer, *_ = partita.initialize(model, Mine(model.parameters(), lr=0.1), config=config(optimizer=None))
    assert isinstance(optimizer, Mine) and isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(optimizer, torch.optim.Adam)
    engine.train_batch(inputs())
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert "Mine (" in repr(optimizer)
    with pytest.raises(RuntimeError, match=r"engine\.step\(\)"):
        optimizer.step()


def _step_in_torch(model: Regression, optimizer: Any, step: int) -> None:
    model(inputs(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_dict_of_stage_0_loads_in_torch(kind, precision):
    """Into a fresh optimizer over a copy of the model, which goes on with the same numbers."""
    engine = _engine(kind, **({} if precision == "fp32" else {"bf16": {"enabled": True}}))
    assert engine.optimizer.state_dict()["state"].keys() <= (set() if kind != "Adagrad" else set(range(4)))
    for step in range(3):
        engine.train_batch(inputs(step))
    model = copy.deepcopy(engine.module)
    make, options = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), **options)
    state = engine.optimizer.state_dict()
    assert all(
        v.untyped_storage().nbytes() == v.nbytes
        for s in state["state"].values()
        for v in s.values()
        if isinstance(v, Tensor)
    )
    optimizer.load_state_dict(state)
    reference = make(model.parameters(), **options)
    assert state["param_groups"] == reference.state_dict()["param_groups"]
    for step in range(3, 6):
        engine.train_batch(inputs(step))
        _step_in_torch(model, optimizer, step)
    tolerance = 1e-6 if precision == "fp32" else 2e-2
    assert_same_weights(weights(engine.module), weights(model), tolerance)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_state_dict_of_other_stages_is_refused_with_the_way_out(stage):
    """A part of the states would look like all of them."""
    engine = _engine(zero_optimization={"stage": stage})
    with pytest.raises(NotImplementedError, match=r"stages 1 to 3.*train_state\(\).*safe_get_full_optimizer_state"):
        engine.optimizer.state_dict()
