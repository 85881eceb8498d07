"""A training state from the middle of a run goes into a new engine, which then makes the same steps, bit for bit."""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Any

import numpy as np
import partita
import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from partita.model import Snapshot
from partita.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

STAGES = (0, 1, 2, 3)
BEFORE, AFTER = 4, 5  # steps
WIDTH = 61
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}},
}


class Numbers(Optimizer):
    """Keeps a tensor that it changes in place, one that it makes anew in every step, an integer, a float, a tensor of
    one number, and a number of its own."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(fast=torch.zeros_like(p), slow=torch.zeros_like(p), count=0, rate=1.0)
                    state["warm"] = torch.zeros(())
                state["fast"].mul_(group["betas"][0]).add_(p.grad)
                state["slow"] = state["slow"] * group["betas"][1] + p.grad
                state["count"] += 1
                state["rate"] *= 0.95
                state["warm"] += 0.125
                size = group["lr"] * state["rate"] / (1 + state["count"])
                p.sub_((state["fast"] + state["slow"]) * size * state["warm"])


OPTIMIZERS: dict[str, Any] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "Adagrad": {"type": "Adagrad", "params": {"lr": 0.05}},
    "Numbers": Numbers,
}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "gradient_clipping": 0.5},
    "offload": {"offload_optimizer": {"device": "cpu"}},
    "schedule": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 0.05}}},
}


class Noise(Dataset[Tensor]):
    def __len__(self) -> int:
        return 52

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(index))


class Model(nn.Module):
    """Random numbers of three kinds in forward, statistics in a buffer, a frozen layer, a tied and a lone parameter.

    Some parameters lie on both ranks where shards are whole pages.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(6, WIDTH)
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.mix.weight
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x.to(self.frozen.weight.dtype))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.float().mean(0), alpha=0.1)
        x = x - self.mean.to(x.dtype)
        x = F.dropout(self.mix(x), 0.3) * self.one + random.random() + float(np.random.rand())
        return self.tied(x).float().square().mean()


def config_for(stage: int, precision: str, optimizer: str, change: str) -> dict[str, Any]:
    changes = dict(CHANGES[change])
    zero = {"stage": stage, "reduce_bucket_size": 60, "stage3_param_persistence_threshold": 0}
    if "offload_optimizer" in changes:
        zero["offload_optimizer"] = changes.pop("offload_optimizer")
    if isinstance(OPTIMIZERS[optimizer], dict):
        changes["optimizer"] = OPTIMIZERS[optimizer]
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "steps_per_print": 0,
        **PRECISIONS[precision],
        **changes,
    }


def engine_for(config: dict[str, Any], optimizer: str, seed: int) -> partita.Engine:
    random.seed(seed)
    np.random.seed(seed)
    given = OPTIMIZERS[optimizer]
    return partita.Engine(Model(seed), None if isinstance(given, dict) else given, train_data=Noise(), config=config)


def take_steps(engine: partita.Engine, steps: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"losses": [], "norms": [], "lr": []}
    for _ in range(steps):
        seen["losses"].append(engine.train_batch().item())
        seen["norms"].append(engine.get_global_grad_norm())
        seen["lr"].append(engine.get_lr())
    snapshot = engine.train_state().copy()
    return {**seen, "weights": engine.module_state_dict(), "snapshot": snapshot, "steps": engine.global_steps}


def through_json(snapshot: Snapshot) -> Snapshot:
    return Snapshot(json.loads(json.dumps(snapshot.sections, allow_nan=False)), snapshot.values, snapshot.tensors)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for what in ("losses", "norms", "lr", "steps"):
        assert ours[what] == theirs[what], what
    for name, value in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], value), name
    assert ours["snapshot"].sections == theirs["snapshot"].sections
    for field in ("values", "tensors"):
        a, b = getattr(ours["snapshot"], field), getattr(theirs["snapshot"], field)
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert torch.equal(a[name], value), name


def _go_on(config: dict[str, Any], optimizer: str) -> None:
    first = engine_for(config, optimizer, seed=1)
    taken = through_json(take_steps(first, BEFORE)["snapshot"])
    unbroken = take_steps(first, AFTER)
    first.destroy()

    second = engine_for(config, optimizer, seed=2)
    second.train_state().restore(taken)
    again = take_steps(second, AFTER)
    assert_same(again, unbroken)
    # In an engine that has trained already, too.
    second.train_state().restore(taken)
    assert_same(take_steps(second, AFTER), unbroken)
    second.destroy()

    third = engine_for(config, optimizer, seed=2)
    other = take_steps(third, AFTER)
    third.destroy()
    assert other["losses"] != unbroken["losses"], "another run makes the same steps: this test shows nothing"


def is_possible(stage: int, precision: str, optimizer: str, change: str) -> bool:
    if change == "offload" and stage == 0:
        return False
    return not (precision == "split" and optimizer != "AdamW")


EVERYTHING = [case for case in product(STAGES, PRECISIONS, OPTIMIZERS, CHANGES) if is_possible(*case)]


@pytest.mark.parametrize(("stage", "precision", "optimizer", "change"), pairwise(EVERYTHING))
def test_a_run_goes_on_in_a_new_engine(ranks, stage, precision, optimizer, change):
    """Losses with dropout, norms, learning rates, weights, states, and where the data is, across an epoch's end."""
    ranks(2).run(_go_on, config_for(stage, precision, optimizer, change), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), *((2, stage) for stage in STAGES)])
def test_every_run_goes_on_in_a_new_engine(ranks, world_size, stage):
    for case in EVERYTHING:
        if case[0] == stage:
            ranks(world_size).run(_go_on, config_for(*case), case[2])


def _in_the_midst(config: dict[str, Any]) -> None:
    engine = engine_for(config, "AdamW", seed=1)
    engine.train_batch()
    state = engine.train_state()
    taken = state.copy()
    engine.backward(engine(torch.ones(2, 6)))
    for call in (state.copy, lambda: state.restore(taken)):
        with pytest.raises(RuntimeError, match=r"gradients of an unfinished step.*zero_grad"):
            call()
    engine.zero_grad()
    state.restore(taken)
    engine.destroy()


def test_a_state_has_no_place_for_gradients(ranks):
    for stage in STAGES:
        ranks(2).run(_in_the_midst, config_for(stage, "fp32", "AdamW", "accumulation"))


def _refused(config: dict[str, Any]) -> None:
    engine = engine_for(config, "AdamW", seed=1)
    engine.train_batch()
    state = engine.train_state()
    taken = state.copy()
    without = dict(list(taken.values.items())[1:])
    for snapshot, complaint in (
        (Snapshot({}, taken.values, taken.tensors), "no section 'accumulation'"),
        (Snapshot(taken.sections, without, taken.tensors), "no value '"),
        (Snapshot(taken.sections, taken.values, {**taken.tensors, "x": torch.ones(1)}), "tensor 'x', which this run"),
    ):
        with pytest.raises(ValueError, match=complaint):
            state.restore(snapshot)
    engine.lr_scheduler = object()
    with pytest.raises(TypeError, match=r"object has no state_dict\(\)"):
        engine.train_state()
    engine.destroy()


def test_what_does_not_fit_is_named(ranks):
    ranks(2).run(_refused, config_for(1, "fp32", "AdamW", "plain"))


def _written_before(config: dict[str, Any]) -> bool:
    """What a program wrote into the weights is in the state."""
    engine = engine_for(config, "AdamW", seed=1)
    engine.train_batch()
    with torch.no_grad():
        engine.module.one.fill_(3.0)
    taken = engine.train_state().copy()
    engine.train_batch()
    engine.train_state().restore(taken)
    value = engine.module_state_dict()["one"].item()
    engine.destroy()
    return value == 3.0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "split"])
def test_written_weights_are_in_the_state(ranks, precision):
    assert ranks(2).run(_written_before, config_for(1, precision, "AdamW", "plain")) == [True, True]


# -- what a review tried


def _after_an_evaluation(config: dict[str, Any]) -> None:
    """A forward with gradients and without a backward leaves parameters gathered; they must not keep the old values."""
    engine = engine_for(config, "AdamW", seed=1)
    engine.train_batch()
    taken = engine.train_state().copy()
    expected = engine.module_state_dict()
    engine.train_batch()
    engine.eval()
    engine(torch.ones(2, 6))
    engine.train()
    engine.train_state().restore(taken)
    for name, value in engine.module_state_dict().items():
        assert torch.equal(value, expected[name]), name
    engine.eval()
    engine(torch.ones(2, 6))
    safe_set_full_fp32_param(engine.module.mix.bias, torch.full((WIDTH,), 2.0))
    assert engine.module_state_dict()["mix.bias"].eq(2.0).all()
    engine.destroy()


@pytest.mark.parametrize("over", ["shared_memory", "torch"])
def test_a_state_reaches_what_an_evaluation_left_gathered(ranks, over):
    config = config_for(3, "fp32", "AdamW", "plain")
    ranks(2).run(_after_an_evaluation, {**config, "comm": {"transport": over}})


def _refused_whole(config: dict[str, Any]) -> None:
    """A state that is refused changes nothing, wherever it is refused."""
    engine = engine_for(config, "SGD", seed=1)
    engine.train_batch()
    state = engine.train_state()
    taken = state.copy()
    engine.train_batch()
    before = state.copy()
    other_data = {**taken.sections, "data": {**taken.sections["data"], "dataset_length": 7}}
    states = taken.sections["optimizer_states"]
    elsewhere = {**taken.sections, "optimizer_states": {**states, "parameters": {"x": {"elements": {}, "rest": {}}}}}
    for sections, complaint in ((other_data, "dataset_length"), (elsewhere, "no parameter 'x'")):
        with pytest.raises(ValueError, match=complaint):
            state.restore(Snapshot(sections, taken.values, taken.tensors))
        now = state.copy()
        assert now.sections == before.sections
        for name, value in before.values.items():
            assert torch.equal(now.values[name], value), name
    engine.destroy()


def test_a_refused_state_changes_nothing(ranks):
    ranks(2).run(_refused_whole, config_for(1, "fp32", "SGD", "plain"))


class Aliases(Optimizer):
    """Two names for one tensor, and another state in two dtypes, by the size of the parameter."""

    def __init__(self, params: Any, lr: float = 0.01, shares: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.shares = shares

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["first"] = torch.zeros_like(p)
                    state["second"] = state["first"] if self.shares else torch.zeros_like(p)
                    small = p.numel() < 4 * WIDTH
                    state["third"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.bfloat16)
                state["first"].add_(p.grad)
                state["second"].mul_(0.5)
                state["third"].copy_(state["third"].float() * 0.9 + p.grad)
                p.sub_((state["first"] + state["second"] + state["third"].float()) * group["lr"])


def _aliases(stage: int, shares: bool) -> None:
    config = config_for(stage, "fp32", "Numbers", "plain")
    model, plain = Model(1), Model(1)
    trained = [p for p in plain.parameters() if p.requires_grad]
    reference = Aliases(trained, shares=shares)
    engine = partita.Engine(model, lambda params: Aliases(params, shares=shares), config=config)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in plain.named_parameters()}
        engine.backward(
            sum((p * grads[n]).sum() for n, p in engine.module.named_parameters()) + 0 * engine(torch.ones(2, 6))
        )
        engine.step()
        for name, p in plain.named_parameters():
            p.grad = grads[name].clone()
        reference.step()
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(engine.module_state_dict()[name], p.detach(), rtol=1e-5, atol=1e-6)
            for key in ("first", "second", "third"):
                value = safe_get_full_optimizer_state(dict(engine.module.named_parameters())[name], key)
                torch.testing.assert_close(value, reference.state[p][key].float(), rtol=1e-2, atol=1e-2)
    if shares:
        with pytest.raises(ValueError, match=r"keeps 'first' of parameter '.*' in memory that it shares"):
            engine.train_state().copy()
    else:
        taken = engine.train_state().copy()
        engine.train_state().restore(through_json(taken))
        again = engine.train_state().copy()
        assert all(torch.equal(again.values[name], value) for name, value in taken.values.items())
        assert {name for _, name in taken.values} <= {"weight", "first", "second", "third", "third:bfloat16"}
        assert engine.global_rank or {"third", "third:bfloat16"} <= {name for _, name in taken.values}
    engine.destroy()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("stage", [0, 1])
def test_optimizers_with_memory_of_their_own_ways(ranks, stage, shares):
    """Trained as in plain PyTorch, read through utils; what could not be restored is refused by name."""
    ranks(2).run(_aliases, stage, shares)
