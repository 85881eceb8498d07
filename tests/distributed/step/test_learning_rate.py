"""The learning rate of every step: schedules of the config, of torch and of users, with groups and skipped steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import partita
import pytest
import torch
from dictated import Dictated, assert_follows, config_for, dictate, masters, merged, plain, share, take_step
from partita.config import ConfigError
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

PATTERN = "..x.xx..."  # x: a step that is skipped, where the schedule must stand still
GOOD = [step for step, event in enumerate(PATTERN) if event == "."]


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    p = dict(module.named_parameters())
    return [{"params": [p["a"], p["e"]], "lr": 0.1}, {"params": [p["b"], p["c"], p["d"]], "lr": 0.2}]


def _sgd(module: nn.Module) -> Optimizer:
    """Its updates are proportional to the learning rate."""
    return torch.optim.SGD(_groups(module), lr=1.0)


def _adam_w(module: nn.Module) -> Optimizer:
    return torch.optim.AdamW(_groups(module), lr=1.0)


def _step_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def _lambda_lr(optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [_third_off, _plus_one])


def _third_off(step: int) -> float:
    return 1.0 - step / 3 if step < 3 else 0.0


def _plus_one(step: int) -> float:
    return step + 1.0


def _sequential(optimizer: Optimizer) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[2])


# The learning rates that the n-th update uses, one row for each group.
TABLE: dict[Callable[[Optimizer], Any], list[list[float]]] = {
    _step_lr: [[0.1, 0.1, 0.05, 0.05, 0.025, 0.025], [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]],
    _lambda_lr: [[0.1, 0.2 / 3, 0.1 / 3, 0.0, 0.0, 0.0], [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]],
    _sequential: [[0.05, 0.075, 0.1, 0.05, 0.025, 0.0125], [0.1, 0.15, 0.2, 0.1, 0.05, 0.025]],
}
CONFIG_TABLE: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "WarmupLR": (
        {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [0.4, 0.5], "warmup_num_steps": 4, "warmup_type": "linear"},
        [[0.0, 0.0, 0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]],
    ),
    "WarmupDecayLR": (
        {"total_num_steps": 4, "warmup_max_lr": 0.4, "warmup_num_steps": 2, "warmup_type": "linear"},
        [[0.0, 0.0, 0.2, 0.4, 0.2, 0.0]] * 2,
    ),
    "StepLR": ({"step_size": 2, "gamma": 0.5}, TABLE[_step_lr]),
    "ExponentialLR": ({"gamma": 0.5}, [[0.1 / 2**k for k in range(6)], [0.2 / 2**k for k in range(6)]]),
}


def _run(
    config: dict[str, Any], make: Any, schedule: Any, given: str
) -> tuple[list[list[float]], dict[str, Tensor], list[str]]:
    """Learning rates before each step, masters at the end, and torch's warnings."""
    model = Dictated()
    optimizer = make(model)
    arguments: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if given == "over the user's optimizer":
            arguments["lr_scheduler"] = schedule(optimizer)
        elif given == "as a function":
            arguments["lr_scheduler"] = schedule
        engine, returned, _, scheduler = partita.initialize(model, optimizer, config=config, **arguments)
        if given == "over the returned optimizer, stepped by hand":
            scheduler = schedule(returned)
        rates = []
        for step, event in enumerate(PATTERN):
            rates.append(engine.get_lr())
            assert rates[-1] == [group["lr"] for group in returned.param_groups]
            assert rates[-1] == [group["lr"] for group in optimizer.param_groups]
            grads = share(dictate(step), engine.global_rank, engine.world_size)
            if event == "x" and engine.global_rank == 0:
                grads["c"][7] = float("inf")
            engine.backward(engine(grads))
            engine.step()
            if engine.lr_scheduler is None and event == ".":
                scheduler.step()
        assert engine.skipped_steps == PATTERN.count("x")
        assert scheduler.get_last_lr() == engine.get_lr()
    return rates, masters(engine), [str(w.message) for w in caught]


def _check(results: list[Any], table: list[list[float]]) -> None:
    used = iter(zip(*table, strict=True))
    row = next(used)
    expected = []
    for event in PATTERN:
        expected.append(list(row))
        if event == ".":
            row = next(used, row)
    for rates, _, caught in results:
        assert rates == [pytest.approx(row, rel=1e-12) for row in expected]
        assert caught == []


@pytest.mark.pairwise
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [_sgd, _adam_w])
@pytest.mark.parametrize("schedule", TABLE)
@pytest.mark.parametrize(
    "given", ["over the user's optimizer", "as a function", "over the returned optimizer, stepped by hand"]
)
def test_torch_schedules_follow_the_table(ranks, given, schedule, make, stage):
    """O5: two groups, three skipped steps; the weights are torch's under the same schedule; torch does not warn."""
    results = ranks(2).run(_run, config_for(stage, "bf16"), make, schedule, given)
    _check(results, TABLE[schedule])
    expected, _ = plain(make, [dictate(step) for step in GOOD], schedule=schedule)
    assert_follows(merged([r[1] for r in results]), expected)


@pytest.mark.parametrize("make", [_sgd, _adam_w])
@pytest.mark.parametrize("kind", CONFIG_TABLE)
def test_schedules_of_the_config_follow_the_table(ranks, kind, make):
    """O5: the weights show that every update used its learning rate."""
    params, table = CONFIG_TABLE[kind]
    config = config_for(2, "fp16", scheduler={"type": kind, "params": params})
    results = ranks(2).run(_run, config, make, None, "in the config")
    _check(results, table)

    def by_table(optimizer: Optimizer) -> Any:
        bases = [group["lr"] for group in optimizer.param_groups]
        factors = [lambda k, row=row, base=base: row[min(k, 5)] / base for row, base in zip(table, bases, strict=True)]
        return lr_scheduler.LambdaLR(optimizer, factors)

    expected, _ = plain(make, [dictate(step) for step in GOOD], schedule=by_table)
    assert_follows(merged([r[1] for r in results]), expected)


def _one_cycle(config: dict[str, Any]) -> dict[str, Tensor]:
    model = Dictated()
    engine = partita.Engine(model=model, optimizer=_adam_w(model), lr_scheduler=_torch_one_cycle, config=config)
    for step in range(6):
        take_step(engine, dictate(step))
    return masters(engine)


def _torch_one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.3], total_steps=8)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_schedule_may_change_betas_too(ranks, stage):
    """O5: the native update reads all settings of its groups at every step."""
    results = ranks(2).run(_one_cycle, config_for(stage))
    expected, _ = plain(_adam_w, [dictate(step) for step in range(6)], schedule=_torch_one_cycle)
    assert_follows(merged(results), expected)


def _changes_by_hand(config: dict[str, Any]) -> dict[str, Tensor]:
    model = Dictated()
    engine, optimizer, _, _ = partita.initialize(model, _sgd(model), config=config)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        take_step(engine, dictate(step))
    return masters(engine)


def test_a_learning_rate_written_by_hand_counts(ranks):
    """O5: param_groups of the returned optimizer are those that the update reads."""
    expected, _ = plain(_halving_sgd, [dictate(step) for step in range(3)])
    assert_follows(merged(ranks(2).run(_changes_by_hand, config_for(1))), expected)


def _halving_sgd(module: nn.Module) -> Optimizer:
    optimizer = _sgd(module)
    optimizer.register_step_pre_hook(_halve)
    return optimizer


def _halve(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"type": "WarmupLr2"}, ["scheduler", "did you mean 'WarmupLR'"]),
        ({"type": "WarmupLR", "params": {"warmup_steps": 3}}, ["scheduler", "'warmup_steps'", "warmup_num_steps"]),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": [1.0, 2.0, 3.0]}}, ["scheduler", "warmup_max_lr"]),
    ],
)
def test_a_bad_schedule_is_refused_by_name(scheduler, words):
    """O5."""
    with pytest.raises(ConfigError) as raised:
        partita.Engine(model=Dictated(), config=config_for(optimizer={"type": "AdamW"}, scheduler=scheduler))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_schedule_that_needs_a_metric_is_refused():
    """O5: ReduceLROnPlateau cannot be stepped by the engine."""
    model = Dictated()
    optimizer = _sgd(model)
    with pytest.raises(TypeError, match="ReduceLROnPlateau needs a metric"):
        partita.Engine(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler.ReduceLROnPlateau(optimizer),
            config=config_for(),
        )
