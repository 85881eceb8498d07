"""Learning-rate schedules against a table made by DeepSpeed, resume, and what they refuse."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from partita.optim.schedule import Schedule
from partita.optim.schedules import OneCycle, make_scheduler, scheduler_types

STEPS = 11

# Made with deepspeed 0.19.8: for every case, AdamW over two groups with lr 0.1 and 0.2,
#   s = getattr(deepspeed.runtime.lr_schedules, type_name)(optimizer, **params)
#   for k in range(11): table.append([g["lr"] for g in optimizer.param_groups]); s.step()
# rounded to 10 digits; one row for each group (a single row: both groups are alike).
GOLDEN: dict[str, tuple[str, dict[str, Any], list[list[float]]]] = {
    "warmup_log": (
        "WarmupLR",
        {"warmup_min_lr": 0.0001, "warmup_max_lr": [0.01, 0.02], "warmup_num_steps": 4},
        [
            [0.0001, 0.0001, 0.00505, 0.007945564379, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01],
            [0.0001, 0.0001, 0.01005, 0.01587037688, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02],
        ],
    ),
    "warmup_linear": (
        "WarmupLR",
        {"warmup_num_steps": 4, "warmup_type": "linear"},
        [
            [0.0, 0.0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
            [0.0, 0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        ],
    ),
    "warmup_one": (
        "WarmupLR",
        {"warmup_num_steps": 1},
        [
            [0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
            [0.0, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        ],
    ),
    "decay_log": (
        "WarmupDecayLR",
        {"total_num_steps": 8, "warmup_num_steps": 3},
        [[0.0, 0.0, 0.0006309297536, 0.001, 0.001, 0.0008, 0.0006, 0.0004, 0.0002, 0.0, 0.0]],
    ),
    "decay_linear": (
        "WarmupDecayLR",
        {
            "total_num_steps": 8,
            "warmup_min_lr": [0.0, 0.001],
            "warmup_max_lr": [0.01, 0.02],
            "warmup_num_steps": 3,
            "warmup_type": "linear",
        },
        [
            [0.0, 0.0, 0.003333333333, 0.006666666667, 0.01, 0.008, 0.006, 0.004, 0.002, 0.0, 0.0],
            [0.001, 0.001, 0.007333333333, 0.01366666667, 0.02, 0.0162, 0.0124, 0.0086, 0.0048, 0.001, 0.001],
        ],
    ),
    "cosine_log": (
        "WarmupCosineLR",
        {"total_num_steps": 8, "warmup_num_steps": 3},
        [
            [
                0.0,
                0.0,
                0.06309297536,
                0.1,
                0.09045180463,
                0.06545430463,
                0.03455569537,
                0.009558195366,
                1e-05,
                1e-05,
                1e-05,
            ],
            [
                0.0,
                0.0,
                0.1261859507,
                0.2,
                0.1809036093,
                0.1309086093,
                0.06911139073,
                0.01911639073,
                2e-05,
                2e-05,
                2e-05,
            ],
        ],
    ),
    "cosine_linear": (
        "WarmupCosineLR",
        {
            "total_num_steps": 8,
            "warmup_min_ratio": 0.25,
            "warmup_num_steps": 3,
            "cos_min_ratio": 0.1,
            "warmup_type": "linear",
        },
        [
            [0.0, 0.025, 0.05, 0.075, 0.09140576475, 0.06890576475, 0.04109423525, 0.01859423525, 0.01, 0.01, 0.01],
            [0.0, 0.05, 0.1, 0.15, 0.1828115295, 0.1378115295, 0.08218847051, 0.03718847051, 0.02, 0.02, 0.02],
        ],
    ),
    "cycle": (
        "OneCycle",
        {"cycle_min_lr": 0.001, "cycle_max_lr": [0.01, 0.02], "cycle_first_step_size": 4},
        [
            [0.001, 0.00325, 0.0055, 0.00775, 0.01, 0.00775, 0.0055, 0.00325, 0.001, 0.001, 0.001],
            [0.001, 0.00575, 0.0105, 0.01525, 0.02, 0.01525, 0.0105, 0.00575, 0.001, 0.001, 0.001],
        ],
    ),
    "cycle_decay": (
        "OneCycle",
        {
            "cycle_min_lr": 0.001,
            "cycle_max_lr": 0.01,
            "decay_lr_rate": 0.5,
            "cycle_first_step_size": 3,
            "cycle_second_step_size": 4,
            "decay_step_size": 2,
            "decay_mom_rate": 0.01,
            "cycle_min_mom": [0.8, 0.7],
        },
        [[0.001, 0.004, 0.007, 0.01, 0.00775, 0.0055, 0.00325, 0.001, 0.0008, 0.0006666666667, 0.0005714285714]],
    ),
    "cycle_stairs": (
        "OneCycle",
        {
            "cycle_min_lr": 0.001,
            "cycle_max_lr": 0.01,
            "cycle_first_step_size": 5,
            "cycle_second_step_size": 4,
            "cycle_first_stair_count": 2,
            "cycle_second_stair_count": 3,
        },
        [[0.001, 0.001, 0.001, 0.0055, 0.0055, 0.01, 0.007, 0.004, 0.001, 0.001, 0.001]],
    ),
    "range": (
        "LRRangeTest",
        {"lr_range_test_min_lr": [0.001, 0.002], "lr_range_test_step_size": 3, "lr_range_test_step_rate": 0.5},
        [
            [
                0.001,
                0.001166666667,
                0.001333333333,
                0.0015,
                0.001666666667,
                0.001833333333,
                0.002,
                0.002166666667,
                0.002333333333,
                0.0025,
                0.002666666667,
            ],
            [
                0.002,
                0.002333333333,
                0.002666666667,
                0.003,
                0.003333333333,
                0.003666666667,
                0.004,
                0.004333333333,
                0.004666666667,
                0.005,
                0.005333333333,
            ],
        ],
    ),
    "range_stairs": (
        "LRRangeTest",
        {"lr_range_test_step_size": 3, "lr_range_test_staircase": True},
        [[0.001, 0.001, 0.001, 0.002, 0.002, 0.002, 0.003, 0.003, 0.003, 0.004, 0.004]],
    ),
}

# The same loop, [g["betas"][0] for g in optimizer.param_groups], without the first value (see OneCycle on k = 0).
GOLDEN_MOMENTUM = {
    "cycle": [
        [0.875, 0.85, 0.825, 0.8, 0.825, 0.85, 0.875, 0.9, 0.9, 0.9],
        [0.875, 0.85, 0.825, 0.8, 0.825, 0.85, 0.875, 0.9, 0.9, 0.9],
    ],
    "cycle_decay": [
        [0.8666666667, 0.8333333333, 0.8, 0.825, 0.85, 0.875, 0.9, 0.9045, 0.909, 0.9135],
        [0.8333333333, 0.7666666667, 0.7, 0.75, 0.8, 0.85, 0.9, 0.9045, 0.909, 0.9135],
    ],
    "cycle_stairs": [
        [0.9, 0.9, 0.85, 0.85, 0.8, 0.8333333333, 0.8666666667, 0.9, 0.9, 0.9],
        [0.9, 0.9, 0.85, 0.85, 0.8, 0.8333333333, 0.8666666667, 0.9, 0.9, 0.9],
    ],
}


def make_optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def run(scheduler: Any, steps: int) -> list[list[tuple[float, ...]]]:
    """(lr, beta1, beta2) of every group before each of ``steps`` calls of step()."""
    table = []
    for _ in range(steps):
        table.append([(group["lr"], *group["betas"]) for group in scheduler.optimizer.param_groups])
        assert scheduler.get_last_lr() == [group["lr"] for group in scheduler.optimizer.param_groups]
        scheduler.optimizer.step()
        scheduler.step()
    return table


@pytest.mark.parametrize("case", GOLDEN)
def test_learning_rates_are_deepspeeds(case: str) -> None:
    type_name, params, expected = GOLDEN[case]
    table = run(make_scheduler(type_name, params, make_optimizer()), STEPS)
    for group, row in enumerate(expected if len(expected) == 2 else expected * 2):
        assert [step[group][0] for step in table] == pytest.approx(row, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("case", GOLDEN_MOMENTUM)
def test_one_cycle_momentum_is_deepspeeds_from_the_second_step(case: str) -> None:
    type_name, params, _ = GOLDEN[case]
    table = run(make_scheduler(type_name, params, make_optimizer()), STEPS)
    for group, row in enumerate(GOLDEN_MOMENTUM[case]):
        assert [step[group][1] for step in table[1:]] == pytest.approx(row, rel=1e-9)
        assert table[0][group][1] == 0.9  # the cycle starts at its maximum
        assert {step[group][2] for step in table} == {0.95}  # beta2 is the optimizer's


def test_one_cycle_momentum_stays_below_one_and_can_be_off() -> None:
    params = {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 1, "decay_step_size": 1}
    growing = OneCycle(make_optimizer(), **params, decay_mom_rate=0.5)
    assert growing.momentum_at(50) == [0.999, 0.999]
    off = OneCycle(make_optimizer(), **params, cycle_momentum=False)
    assert {group[1:] for step in run(off, 5) for group in step} == {(0.9, 0.95)}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("at", range(STEPS))
def test_resumed_equals_unbroken(case: str, at: int) -> None:
    type_name, params, _ = GOLDEN[case]
    unbroken = run(make_scheduler(type_name, params, make_optimizer()), STEPS)
    first = make_scheduler(type_name, params, make_optimizer())
    run(first, at)
    saved = json.loads(json.dumps(first.state_dict()))  # a checkpoint holds JSON
    second = make_scheduler(type_name, params, make_optimizer())
    second.load_state_dict(saved)
    assert run(second, STEPS - at) == unbroken[at:]


def test_resume_takes_the_shape_from_the_configuration() -> None:
    first = make_scheduler("WarmupDecayLR", {"total_num_steps": 8, "warmup_num_steps": 3}, make_optimizer())
    run(first, 6)
    longer = {"total_num_steps": 16, "warmup_num_steps": 3}
    second = make_scheduler("WarmupDecayLR", longer, make_optimizer())
    second.load_state_dict(first.state_dict())
    assert run(second, 5) == run(make_scheduler("WarmupDecayLR", longer, make_optimizer()), 11)[6:]


def test_last_batch_iteration_continues_a_schedule() -> None:
    type_name, params, _ = GOLDEN["decay_linear"]
    unbroken = run(make_scheduler(type_name, params, make_optimizer()), STEPS)
    optimizer = make_optimizer()
    run(make_scheduler(type_name, params, optimizer), 5)
    assert run(make_scheduler(type_name, {**params, "last_batch_iteration": 4}, optimizer), STEPS - 5) == unbroken[5:]


def test_a_tensor_learning_rate_is_written_in_place() -> None:
    lr = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr, capturable=False, foreach=False)
    scheduler = make_scheduler("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, optimizer)
    held = optimizer.param_groups[0]["lr"]
    seen = []
    for _ in range(6):
        seen.append(float(held))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert seen == pytest.approx([0.0, 0.0, 0.025, 0.05, 0.075, 0.1])


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_one_cycle_stays_in_range(first: int, second: int, stairs: int, second_stairs: int, decay: int) -> None:
    params = {
        "cycle_min_lr": 1.0,
        "cycle_max_lr": 2.0,
        "cycle_first_step_size": first,
        "cycle_second_step_size": second,
        "cycle_first_stair_count": stairs,
        "cycle_second_stair_count": second_stairs,
        "decay_step_size": decay,
        "decay_lr_rate": 0.5,
    }
    scheduler = OneCycle(make_optimizer(), **params)
    lrs = [scheduler.lr_at(step)[0] for step in range(first + second + 5)]
    assert lrs[first] == 2.0
    assert lrs[:first] == sorted(lrs[:first]) and lrs[first:] == sorted(lrs[first:], reverse=True)
    assert all(1.0 <= lr <= 2.0 for lr in lrs[: first + second])
    if second:
        assert lrs[first + second] == 1.0


def test_one_cycle_stairs_are_counted_in_integers() -> None:
    """1 / 49 * 49 is below 1 in floating point, which would lose a stair."""
    params = {"cycle_min_lr": 0.0, "cycle_max_lr": 49.0, "cycle_first_step_size": 49, "cycle_first_stair_count": 49}
    scheduler = OneCycle(make_optimizer(), **params)
    assert [scheduler.lr_at(step)[0] for step in range(50)] == pytest.approx(list(range(50)))


def test_torch_schedulers_by_name() -> None:
    scheduler = make_scheduler("StepLR", {"step_size": 2, "gamma": 0.5}, make_optimizer())
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert "CosineAnnealingLR" in scheduler_types() and "LRScheduler" not in scheduler_types()
    assert all(issubclass(scheduler_types()[type_name], Schedule) for type_name, _, _ in GOLDEN.values())


CYCLE = {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0}


@pytest.mark.parametrize(
    ("type_name", "params", "words"),
    [
        ("WarmupLr", {}, ["'WarmupLr'", "did you mean 'WarmupLR'"]),
        ("CosineAnealingLR", {}, ["did you mean 'CosineAnnealingLR'"]),
        ("", {}, ["scheduler type ''"]),
        ("WarmupLR", {"warmup_steps": 3}, ["WarmupLR", "'warmup_steps'", "did you mean 'warmup_num_steps'"]),
        ("WarmupLR", {"optimizer": None}, ["WarmupLR has no parameter 'optimizer'"]),
        ("StepLR", {"stepsize": 3}, ["StepLR", "'stepsize'", "did you mean 'step_size'"]),
        ("StepLR", {}, ["StepLR", "'step_size'"]),
        ("WarmupDecayLR", {}, ["WarmupDecayLR", "'total_num_steps'"]),
        ("OneCycle", {"cycle_min_lr": 0.0}, ["OneCycle", "'cycle_max_lr'"]),
        (
            "WarmupDecayLR",
            {"total_num_steps": 5, "warmup_num_steps": 6},
            ["total_num_steps", "warmup_num_steps (6)", "5"],
        ),
        ("WarmupCosineLR", {"total_num_steps": 5}, ["total_num_steps", "warmup_num_steps (1000)"]),
        ("WarmupDecayLR", {"total_num_steps": None}, ["total_num_steps", "integer", "None"]),
        ("WarmupLR", {"warmup_min_lr": -0.1}, ["WarmupLR: warmup_min_lr", "-0.1"]),
        ("WarmupLR", {"warmup_max_lr": math.nan}, ["warmup_max_lr", "nan"]),
        ("WarmupLR", {"warmup_max_lr": [0.1, math.inf]}, ["warmup_max_lr", "inf"]),
        ("WarmupLR", {"warmup_max_lr": "auto"}, ["warmup_max_lr", "'auto'"]),
        ("WarmupLR", {"warmup_max_lr": [0.1]}, ["warmup_max_lr", "list of 2"]),
        ("WarmupLR", {"warmup_min_lr": 0.15}, ["warmup_min_lr", "warmup_max_lr (0.1 in param group 0)"]),
        ("WarmupLR", {"warmup_num_steps": 0}, ["warmup_num_steps", ">= 1"]),
        ("WarmupLR", {"warmup_num_steps": 2.5}, ["warmup_num_steps", "2.5"]),
        ("WarmupLR", {"warmup_num_steps": True}, ["warmup_num_steps", "True"]),
        ("WarmupLR", {"warmup_type": "cosine"}, ["warmup_type", "'log' or 'linear'", "'cosine'"]),
        ("WarmupLR", {"last_batch_iteration": -2}, ["last_batch_iteration", ">= -1"]),
        ("WarmupCosineLR", {"total_num_steps": 2000, "cos_min_ratio": 1.5}, ["cos_min_ratio", "0 to 1", "1.5"]),
        ("OneCycle", {**CYCLE, "cycle_min_lr": 2.0}, ["cycle_min_lr", "cycle_max_lr (1.0"]),
        ("OneCycle", {**CYCLE, "cycle_max_mom": 1.0}, ["cycle_max_mom", "1.0"]),
        ("OneCycle", {**CYCLE, "cycle_min_mom": 0.95}, ["cycle_min_mom", "cycle_max_mom (0.9"]),
        ("OneCycle", {**CYCLE, "cycle_first_step_size": 0}, ["cycle_first_step_size", ">= 1"]),
        ("LRRangeTest", {"lr_range_test_step_size": -1}, ["lr_range_test_step_size", "-1"]),
        ("LRRangeTest", {"lr_range_test_step_rate": -1.0}, ["lr_range_test_step_rate", "-1.0"]),
    ],
)
def test_errors_name_the_thing(type_name: str, params: dict[str, Any], words: list[str]) -> None:
    optimizer = make_optimizer()
    with pytest.raises(ValueError) as caught:
        make_scheduler(type_name, params, optimizer)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]  # a refused schedule leaves no trace


def test_one_cycle_refuses_an_optimizer_without_betas() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="cycle_momentum must be false for SGD"):
        make_scheduler("OneCycle", CYCLE, optimizer)
    make_scheduler("OneCycle", {**CYCLE, "cycle_momentum": False}, optimizer)


def test_a_foreign_state_is_refused() -> None:
    scheduler = make_scheduler("WarmupLR", {}, make_optimizer())
    with pytest.raises(ValueError, match=r"'last_epoch'.*milestones"):
        scheduler.load_state_dict({"milestones": [3]})
