"""DeepSpeed's calls on a schedule: where they lead, against tables of DeepSpeed 0.19.8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from partita.optim.schedules import OneCycle, make_scheduler
from torch.optim.lr_scheduler import SequentialLR

PARAMS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_num_steps": 4, "warmup_type": "linear"},
    "WarmupDecayLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 3},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4},
    "LRRangeTest": {"lr_range_test_step_size": 3, "lr_range_test_step_rate": 0.5},
}
# DeepSpeed's schedule.step(k), then optimizer.param_groups[0]["lr"], for k = 0, 3, 6, 1.
AFTER_STEP: dict[str, list[float]] = {
    "WarmupLR": [0.0, 0.075, 0.1, 0.025],
    "WarmupDecayLR": [0.0, 0.001, 0.0004, 0.0006309297536],
    "WarmupCosineLR": [0.0, 0.09045180463, 0.009558195366, 0.06309297536],
    "OneCycle": [0.00325, 0.01, 0.00325, 0.0055],
    "LRRangeTest": [0.001166666667, 0.001666666667, 0.002166666667, 0.001333333333],
}


def make(kind: str) -> Any:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.95))
    return make_scheduler(kind, PARAMS[kind], optimizer)


def lr(schedule: Any) -> float:
    return float(schedule.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("name", [None, "batch_iteration", "last_batch_iteration"])
def test_step_with_an_iteration_goes_where_deepspeeds_does(kind: str, name: str | None) -> None:
    """Iteration k is where k + 1 plain calls lead; torch's epoch would be one less."""
    schedule, seen = make(kind), []
    for iteration in (0, 3, 6, 1):
        schedule.step(iteration) if name is None else schedule.step(**{name: iteration})
        assert schedule.last_batch_iteration == iteration
        assert schedule.get_last_lr() == [lr(schedule)] == schedule.get_lr()
        seen.append(lr(schedule))
    assert seen == pytest.approx(AFTER_STEP[kind], rel=1e-8)
    plain = make(kind)
    for _ in range(2):
        plain.step()
    assert lr(plain) == lr(schedule)


@pytest.mark.parametrize("kind", PARAMS)
def test_a_state_of_deepspeed_leads_to_its_position(kind: str) -> None:
    schedule = make(kind)
    schedule.load_state_dict({"last_batch_iteration": 3})
    assert lr(schedule) == pytest.approx(AFTER_STEP[kind][1], rel=1e-8)


@pytest.mark.parametrize("wrong", [(-2,), (1.5,), ("3",)])
def test_an_iteration_out_of_range_is_named(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="WarmupLR: iteration must be an integer >= -1"):
        make("WarmupLR").step(*wrong)


def test_two_iterations_and_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match="takes one iteration"):
        make("WarmupLR").step(1, batch_iteration=2)
    with pytest.raises(TypeError, match="iterations"):
        make("WarmupLR").step(iterations=2)


def test_get_lr_ratio_of_the_cosine() -> None:
    """The factor of each group's own lr, 0.1 here."""
    schedule = make("WarmupCosineLR")
    assert schedule.get_lr_ratio() == 0.0
    for iteration, expected in zip((0, 3, 6, 1), AFTER_STEP["WarmupCosineLR"], strict=True):
        schedule.step(iteration)
        assert schedule.get_lr_ratio() == pytest.approx(expected / 0.1, rel=1e-8)


def test_get_mom_of_one_cycle_is_what_the_optimizer_has() -> None:
    schedule = make("OneCycle")
    seen = []
    for _ in range(6):
        assert schedule.get_mom() == [group["betas"] for group in schedule.optimizer.param_groups]
        seen.append(schedule.get_mom()[0])
        schedule.step()
    assert seen == [(pytest.approx(beta1), 0.95) for beta1 in (0.9, 0.875, 0.85, 0.825, 0.8, 0.825)]
    off = OneCycle(schedule.optimizer, **PARAMS["OneCycle"], cycle_momentum=False)
    assert off.get_mom() is None


def test_one_cycle_inside_a_sequence_of_torch_moves_the_momentum_too() -> None:
    """`SequentialLR` goes past step()."""
    first, second = make("OneCycle"), make("OneCycle")
    second.optimizer = first.optimizer
    sequence = SequentialLR(first.optimizer, [first, second], milestones=[2])
    for _ in range(4):
        sequence.step()
    alone = make("OneCycle")
    for _ in range(2):
        alone.step()
    assert lr(second) == lr(alone)
    assert second.get_mom() == alone.get_mom() == [group["betas"] for group in first.optimizer.param_groups]
