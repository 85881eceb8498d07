"""Optimizers of torch and of users: element-wise ones in every stage, others in stage 0 or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import SHAPES, Dictated, assert_follows, config_for, dictate, masters, merged, plain, take_step
from partita.device import kernels
from support import whole
from torch import Tensor, nn
from torch.optim import Optimizer

STAGES = (0, 1, 2, 3)
STEPS = 10


class Lamb(Optimizer):
    """The step of every tensor is scaled by the norms of the whole tensor (You et al. 2020), without moments."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    p.sub_(p.grad, alpha=group["lr"] * float(p.norm() / (p.grad.norm() + 1e-6)))


class Coupled(Optimizer):
    """One step size for all tensors, from all gradients."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = float(sum(p.grad.abs().sum() for p in tensors)) + 1.0
        for p in tensors:
            p.sub_(p.grad / size)


class Lion(Optimizer):
    """Element-wise (Chen et al. 2023), with settings of its own outside the param groups and a counter of its steps."""

    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr})
        self.betas = betas
        self.steps_taken = [0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps_taken[0] += 1
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                p.sub_((moment * self.betas[0] + p.grad * (1 - self.betas[0])).sign(), alpha=group["lr"])
                moment.lerp_(p.grad, 1 - self.betas[1])


class Wrapper(Optimizer):
    """Steps another optimizer, which knows nothing of shards."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, dict(inner.defaults))

    def step(self, closure: Any = None) -> None:
        self.inner.step()


Recipe = tuple[type[Optimizer], dict[str, Any]]
ELEMENTWISE: dict[str, Recipe] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.05, "weight_decay": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.05, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.05}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.02}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05, "t0": 3.0, "lambd": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.01}),
    "maximize": (torch.optim.AdamW, {"lr": 0.05, "maximize": True}),
    "Lion": (Lion, {"lr": 0.02}),
}
NATIVE: dict[str, Recipe] = {
    "Adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.01, "eps": 1e-6}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "betas": (0.8, 0.9)}),
    "FusedAdam": (partita.optim.FusedAdam, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.01}),
}
WHOLE: dict[str, Recipe] = {
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
    "Lamb": (Lamb, {"lr": 0.1}),
    "Coupled": (Coupled, {}),
}


def _expected(recipe: Recipe) -> dict[str, Tensor]:
    make, options = recipe
    if make is partita.optim.FusedAdam:
        make = torch.optim.AdamW
    return plain(lambda module: make(module.parameters(), **options), [dictate(s) for s in range(STEPS)])[0]


def _train(config: dict[str, Any], recipe: Recipe, as_function: bool = False) -> tuple[dict[str, Tensor], str]:
    """Masters after ten steps with the user's own optimizer object (or a function that makes it)."""
    model = Dictated()
    make, options = recipe
    given = (lambda parameters: make(parameters, **options)) if as_function else make(model.parameters(), **options)
    engine = partita.Engine(model=model, optimizer=given, config=config)
    for step in range(STEPS):
        take_step(engine, dictate(step))
    with whole(engine):
        for name, value in masters(engine).items():
            known = ~value.isnan()
            parameter = dict(model.named_parameters())[name]
            rounded = torch.empty_like(value[known], dtype=parameter.dtype)
            if parameter.dtype is torch.float32:
                rounded.copy_(value[known])
            else:  # bf16 ties away from zero
                kernels.split_master(rounded, value[known])
            assert torch.equal(parameter.flatten()[known], rounded), f"{name} is not its master"
    return masters(engine), inside.update_kind(engine)


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_element_wise_optimizer_equals_torch(ranks, name, stage, precision):
    """O7: in every stage; on 16-bit parameters through the fp32 masters."""
    results = ranks(2).run(_train, config_for(stage, precision), ELEMENTWISE[name])
    assert [kind for _, kind in results] == ["TorchUpdate"] * 2
    assert_follows(merged([r[0] for r in results]), _expected(ELEMENTWISE[name]))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NATIVE)
def test_the_users_adam_runs_natively(ranks, name, stage):
    """O4: torch.optim.Adam and AdamW objects, with torch's result."""
    results = ranks(2).run(_train, config_for(stage, "bf16"), NATIVE[name])
    assert [kind for _, kind in results] == ["NativeAdam"] * 2
    assert_follows(merged([r[0] for r in results]), _expected(NATIVE[name]))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_optimizer_may_be_given_as_a_function(ranks, name):
    """O4: of the parameters; a class is such a function."""
    recipe = {**NATIVE, **ELEMENTWISE}[name]
    results = ranks(2).run(_train, config_for(1), recipe, True)
    assert_follows(merged([r[0] for r in results]), _expected(recipe))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "Rprop", "ASGD"])
def test_the_config_names_any_of_them(ranks, name):
    """O7: by its name in torch.optim."""
    optimizer = {"type": name, "params": ELEMENTWISE[name][1]}
    results = ranks(2).run(_from_config, config_for(2, optimizer=optimizer))
    assert_follows(merged(results), _expected(ELEMENTWISE[name]))


def _from_config(config: dict[str, Any]) -> dict[str, Tensor]:
    engine = partita.Engine(model=Dictated(), config=config)
    for step in range(STEPS):
        take_step(engine, dictate(step))
    return masters(engine)


@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_of_whole_tensors_runs_in_stage_0(ranks, name):
    """O7: with torch's result."""
    results = ranks(2).run(_train, config_for(0, "bf16"), WHOLE[name])
    assert_follows(merged([r[0] for r in results]), _expected(WHOLE[name]))


def _muon(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    engine = partita.Engine(model=model, optimizer=torch.optim.Muon(model.parameters(), lr=0.1), config=config)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        engine.backward((engine(torch.randn(6, generator=generator)) ** 2).sum())
        engine.step()
    return {"weight": model.weight.detach().flatten()}


def test_muon_runs_in_stage_0(ranks):
    """O7: it sees matrices."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        (model(torch.randn(6, generator=generator)) ** 2).sum().backward()
        optimizer.step()
    for weights in ranks(2).run(_muon, config_for(0)):
        assert_follows(weights, {"weight": model.weight.detach().flatten()}, tolerance=1e-5)


def _wrap_sgd(parameters: Any) -> Optimizer:
    return Wrapper(torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.Adafactor, "piece"),
        (Lamb, "piece"),
        (Coupled, "depends on the others"),
        (torch.optim.Muon, "fails on pieces"),
        (_wrap_sgd, "does not reach"),
    ],
)
def test_an_optimizer_of_whole_tensors_is_refused_above_stage_0(stage, make, reason):
    """O7: by its name, with a way out, and before the model is touched."""
    model = Dictated({"a": (5, 7), "e": (6, 3)})
    optimizer = make(model.parameters())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"^{type(optimizer).__name__} .*stage {stage}: .*{reason}.*use stage 0"):
        partita.Engine(model=model, optimizer=optimizer, config=config_for(stage, "bf16"))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_needs_a_closure_is_refused(stage):
    """O7: LBFGS in any stage, as engine.step() has no closure to give."""
    model = Dictated()
    with pytest.raises(ValueError, match=r"^LBFGS .*closure"):
        partita.Engine(model=model, optimizer=torch.optim.LBFGS(model.parameters()), config=config_for(stage))


@pytest.mark.parametrize("fails_in", ["optimizer", "scheduler"])
def test_after_a_refusal_the_model_trains_with_another_optimizer(ranks, fails_in):
    """O7: the engine that was refused leaves no hooks that would swallow gradients."""
    results = ranks(2).run(_second_attempt, config_for(1), fails_in)
    assert_follows(merged(results), _expected(ELEMENTWISE["SGD"]))


def _second_attempt(config: dict[str, Any], fails_in: str) -> dict[str, Tensor]:
    model = Dictated()
    make, options = ELEMENTWISE["SGD"]
    bad = {"optimizer": Lamb(model.parameters())} if fails_in == "optimizer" else {"lr_scheduler": object()}
    arguments = {"optimizer": make(model.parameters(), **options), **bad}
    try:
        partita.Engine(model=model, config=config, **arguments)
    except (ValueError, TypeError):
        pass
    else:
        raise AssertionError("not refused")
    engine = partita.Engine(model=model, optimizer=make(model.parameters(), **options), config=config)
    for step in range(STEPS):
        take_step(engine, dictate(step))
    return masters(engine)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("stage", STAGES)
def test_state_of_earlier_steps_is_refused(name, stage):
    """O7: it would be lost."""
    model = Dictated()
    make, options = {**NATIVE, **ELEMENTWISE}[name]
    optimizer = make(model.parameters(), **options)
    model(dictate(0)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=rf"^{make.__name__} has state of earlier steps.*fresh"):
        partita.Engine(model=model, optimizer=optimizer, config=config_for(stage))


def test_trying_an_optimizer_leaves_it_alone():
    """O7: neither its attributes, nor its hooks, nor the random numbers notice."""
    model = Dictated()
    optimizer = Lion(model.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    engine = partita.Engine(model=model, optimizer=optimizer, config=config_for(1))
    assert calls == []
    assert optimizer.steps_taken == [0]
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    take_step(engine, dictate(0))
    assert calls == ["pre", "post"]
    engine.destroy()


def test_a_foreign_parameter_in_the_optimizer_is_refused():
    """O7: it would not be trained."""
    model, other = Dictated(), nn.Parameter(torch.zeros(4, 9))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(4, 9\)"):
        partita.Engine(model=model, optimizer=optimizer, config=config_for(1))
    assert set(SHAPES) == {name for name, _ in model.named_parameters()}
