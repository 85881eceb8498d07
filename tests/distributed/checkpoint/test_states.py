"""C5: which optimizer states and learning rates are loaded where model, optimizer or schedule are not as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import partita
import pytest
import torch
from partita.checkpoint import CheckpointError
from partita.optim import WarmupLR
from partita.utils import safe_get_full_optimizer_state
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, lr_scheduler

LR = 0.01
OPTIMIZERS: dict[str, tuple[Callable[..., Any], str]] = {
    "native": (lambda p: AdamW(p, lr=LR, weight_decay=0.0), "exp_avg"),
    "amsgrad": (lambda p: AdamW(p, lr=LR, weight_decay=0.0, amsgrad=True), "exp_avg"),
    "momentum": (lambda p: SGD(p, lr=LR, momentum=0.9), "momentum_buffer"),
    "Adagrad": (lambda p: Adagrad(p, lr=LR), "sum"),
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "closed": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "of ours in one of torch's": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ExponentialLR(o, 0.8), WarmupLR(o, warmup_num_steps=3, warmup_max_lr=0.05)], [8]
    ),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=20),
}


class Model(nn.Module):
    def __init__(self, seed: int, head: int = 3, body: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 6) if body else nn.Identity()
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.body(x))))).square().mean()


def engine_for(
    model: nn.Module, stage: int, optimizer: Callable[..., Any], schedule: Callable[..., Any] | None = None
) -> partita.Engine:
    zero = {"stage": stage, "reduce_bucket_size": 60, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "steps_per_print": 0}
    trained = [p for p in model.parameters() if p.requires_grad]
    return partita.Engine(model, config=config, optimizer=optimizer(trained), lr_scheduler=schedule)


def take_steps(engine: partita.Engine, steps: int, seed: int = 0) -> list[float]:
    """The losses."""
    losses = []
    for i in range(steps):
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(100 * seed + 2 * i + engine.global_rank))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@contextmanager
def messages() -> Iterator[list[str]]:
    """What the engine says in the block."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("partita"), logging.getLogger("partita").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _frozen(model: nn.Module) -> nn.Module:
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    return model


def _left_out(folder: str, stage: int, kind: str) -> None:
    make, state = OPTIMIZERS[kind]
    engine = engine_for(Model(1), stage, make)
    take_steps(engine, 2)
    engine.module.body.requires_grad_(False)
    take_steps(engine, 1)
    engine.save_checkpoint(folder)
    weights = engine.module_state_dict()
    values = safe_get_full_optimizer_state(engine.module.head.weight, state)
    losses = take_steps(engine, 3, seed=1)
    engine.destroy()
    for model, strict in ((_frozen(Model(2)), True), (_frozen(Model(2)), False), (Model(2, body=False), False)):
        engine = engine_for(model, stage, make)
        with messages() as said:
            engine.load_checkpoint(folder, load_module_strict=strict)
        assert len([m for m in said if "'body.bias'" in m and "not trained here" in m]) == (engine.global_rank == 0)
        loaded = engine.module_state_dict()
        assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
        assert torch.equal(safe_get_full_optimizer_state(engine.module.head.weight, state), values)
        assert take_steps(engine, 3, seed=1) == losses or isinstance(model.body, nn.Identity)
        engine.destroy()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stage", [0, 2])
def test_states_of_what_is_not_trained_any_more_are_left_out(ranks, tmp_path, stage, kind):
    """Frozen in the midst of the run that saved, and frozen or not there in the run that loads; rank 0 says so."""
    ranks(2).run(_left_out, str(tmp_path), stage, kind)


def _new_head(folder: str, stage: int, kind: str) -> None:
    make, state = OPTIMIZERS[kind]
    engine = engine_for(Model(1), stage, make)
    take_steps(engine, 20)
    engine.save_checkpoint(folder)
    engine.destroy()
    fresh = engine_for(Model(2, head=4), stage, make)
    fresh.load_checkpoint(folder, load_module_strict=False)
    before = fresh.module_state_dict()["head.weight"]
    take_steps(fresh, 1)
    moved = (fresh.module_state_dict()["head.weight"] - before).abs().max().item()
    if kind != "momentum":
        assert moved == pytest.approx(LR, rel=0.01)
    fresh.destroy()
    ahead = engine_for(Model(2, head=4), stage, make)
    take_steps(ahead, 3)
    now = safe_get_full_optimizer_state(ahead.module.head.weight, state)
    middle = safe_get_full_optimizer_state(ahead.module.middle.weight, state)
    ahead.load_checkpoint(folder, load_module_strict=False)
    assert now.any() and torch.equal(safe_get_full_optimizer_state(ahead.module.head.weight, state), now)
    assert not torch.equal(safe_get_full_optimizer_state(ahead.module.middle.weight, state), middle)
    take_steps(ahead, 1)
    ahead.destroy()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_parameter_of_another_shape_keeps_the_states_that_it_has(ranks, tmp_path, stage, kind):
    """None, so that its first update is that of a first step; or those of the steps that it has taken."""
    ranks(2).run(_new_head, str(tmp_path), stage, kind)


class Refusing:
    """A schedule that takes no state on one rank."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.count = refuses, 0

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses and state["count"] == 3:
            raise ValueError("this schedule ended")
        self.count = state["count"]


def _refused_by_one(folder: str) -> tuple[str, list[str]]:
    """What the error says, and what has changed."""
    schedule = Refusing(False)
    engine = engine_for(Model(1), 1, OPTIMIZERS["momentum"][0], lambda _: schedule)
    rank = engine.global_rank
    take_steps(engine, 3)
    engine.save_checkpoint(folder)
    engine.destroy()
    schedule = Refusing(rank == 1)
    engine = engine_for(Model(2), 1, OPTIMIZERS["momentum"][0], lambda _: schedule)
    engine.optimizer.param_groups[0]["lr"] = 0.5
    take_steps(engine, 1)
    before = engine.train_state().copy()
    with pytest.raises(CheckpointError) as raised:
        engine.load_checkpoint(folder)
    after = engine.train_state().copy()
    changed = [name for name, state in after.sections.items() if state != before.sections[name]]
    assert after.values.keys() == before.values.keys()
    changed += [str(name) for name, value in after.values.items() if not torch.equal(value, before.values[name])]
    engine.destroy()
    return str(raised.value), changed


def test_what_one_rank_refuses_none_has_taken(ranks, tmp_path):
    (message, changed), second = ranks(2).run(_refused_by_one, str(tmp_path))
    assert (message, changed) == second
    assert "rank 1: this schedule ended" in message and str(tmp_path) in message
    assert changed == []


def _rates(engine: partita.Engine) -> list[float]:
    rates = []
    for _ in range(6):
        rates += engine.get_lr()
        take_steps(engine, 1)
    return rates


def _schedule_alone(folder: str, name: str) -> None:
    make, schedule = OPTIMIZERS["native"][0], SCHEDULES[name]
    engine = engine_for(Model(1), 1, make, schedule)
    take_steps(engine, 4)
    engine.save_checkpoint(folder)
    unbroken = _rates(engine)
    engine.destroy()
    for steps in (0, 1, 2):  # with the optimizer after 1
        engine = engine_for(Model(2), 1, make, schedule)
        take_steps(engine, steps)
        engine.load_checkpoint(folder, load_optimizer_states=steps == 1)
        assert _rates(engine) == unbroken, f"after {steps} steps"
        engine.destroy()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_without_its_optimizer_goes_on_with_its_learning_rates(ranks, tmp_path, name):
    ranks(2).run(_schedule_alone, str(tmp_path), name)


def _optimizer_alone(folder: str, name: str) -> None:
    make, schedule = OPTIMIZERS["native"][0], SCHEDULES[name]
    engine = engine_for(Model(1), 1, make, schedule)
    take_steps(engine, 4)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_for(Model(2), 1, lambda p: AdamW(p, lr=0.5, eps=1e-3), schedule)
    moved = {"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"} & {
        *engine.optimizer.param_groups[0]
    }
    before = {key: engine.optimizer.param_groups[0][key] for key in moved}
    betas = engine.optimizer.param_groups[0]["betas"]
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    group = engine.optimizer.param_groups[0]
    assert {key: group[key] for key in moved} == before
    assert group["betas"] == betas and group["eps"] == 1e-8
    rates = _rates(engine)
    engine.destroy()
    engine = engine_for(Model(2), 1, lambda p: AdamW(p, lr=0.5), schedule)
    assert _rates(engine) == rates
    engine.destroy()


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_optimizer_without_its_schedule_has_the_learning_rates_of_the_new_one(ranks, tmp_path, name):
    ranks(2).run(_optimizer_alone, str(tmp_path), name)


def _twice(folder: str) -> list[str]:
    engine = engine_for(Model(1), 1, OPTIMIZERS["native"][0], SCHEDULES["exponential"])
    take_steps(engine, 2)
    engine.save_checkpoint(folder)
    with messages() as said:
        for _ in range(3):
            engine.load_checkpoint(folder)
            take_steps(engine, 1)
    with messages() as warned:
        for _ in range(3):
            take_steps(engine, 1)
            engine.lr_scheduler.step()
        take_steps(engine, 1)
    engine.destroy()
    assert len([m for m in warned if "called by the program" in m]) == (engine.global_rank == 0)
    return [m for m in said if "called by the program" in m]


def test_a_load_is_no_step_of_the_programs(ranks, tmp_path):
    """The warning that the program steps the schedule comes when it does."""
    assert ranks(2).run(_twice, str(tmp_path)) == [[], []]


def _two_groups(parameters: list[nn.Parameter]) -> Any:
    return AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=LR)


def _kinds(folder: str, saved: str, here: Callable[..., Any], *words: str) -> str:
    engine = engine_for(Model(1), 1, OPTIMIZERS[saved][0])
    take_steps(engine, 2)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_for(Model(2), 1, here)
    take_steps(engine, 1)
    before = engine.train_state().copy()
    for strict in (True, False):
        with pytest.raises(CheckpointError) as raised:
            engine.load_checkpoint(folder, load_module_strict=strict)
        assert engine.train_state().copy().sections == before.sections
    message = str(raised.value)
    assert [word for word in (folder, "load_optimizer_states=False", *words) if word not in message] == [], message
    assert "rank" not in message
    engine.load_checkpoint(folder, load_optimizer_states=False)
    take_steps(engine, 1)
    engine.destroy()
    return message


OTHER_KINDS: list[tuple[str, Callable[..., Any], tuple[str, ...]]] = [
    ("momentum", OPTIMIZERS["native"][0], ("SGD", "AdamW (native)")),
    ("native", OPTIMIZERS["momentum"][0], ("SGD", "AdamW (native)")),
    ("momentum", OPTIMIZERS["Adagrad"][0], ("SGD", "Adagrad")),
    ("native", _two_groups, ("2 param groups", "the state has 1")),
]


@pytest.mark.parametrize("case", range(len(OTHER_KINDS)))
def test_another_kind_of_optimizer_is_refused_by_both_names(ranks, tmp_path, case):
    first, second = ranks(2).run(_kind_case, str(tmp_path), case)
    assert first == second


def _kind_case(folder: str, case: int) -> str:
    saved, here, words = OTHER_KINDS[case]
    return _kinds(folder, saved, here, *words)


def _adapters(folder: str, stage: int) -> None:
    engine = engine_for(_frozen(Model(1)), stage, OPTIMIZERS["native"][0])
    take_steps(engine, 3)
    engine.save_checkpoint(folder)
    weights = engine.module_state_dict()
    engine.destroy()
    for there in (stage, (stage + 1) % 4):
        engine = engine_for(_frozen(Model(2)), there, OPTIMIZERS["native"][0])
        engine.load_checkpoint(folder, load_optimizer_states=False)
        loaded = engine.module_state_dict()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
        take_steps(engine, 1)
        moved = engine.module_state_dict()
        assert (moved["head.weight"] - loaded["head.weight"]).abs().max().item() == pytest.approx(LR, rel=0.01)
        assert torch.equal(moved["body.weight"], weights["body.weight"])
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_begin_their_states_anew(ranks, tmp_path, stage):
    """load_optimizer_states=False where a part of the model is frozen: the first update is that of a first step."""
    ranks(2).run(_adapters, str(tmp_path), stage)
