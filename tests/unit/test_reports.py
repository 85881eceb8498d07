"""What a run says about its start and its steps: the progress line, odd steps, a schedule that is stepped twice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import partita
import pytest
import torch
from late_streams import on_late_streams
from small_models import Regression, config, inputs, seeded
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 50}}


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged in this block."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("partita")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged() as said:
        yield said


# -- the start


def test_one_rank_is_over_nothing_and_nothing_is_zero(lines):
    partita.Engine(seeded(), config=config())
    partita.Engine(seeded(), config=config(optimizer=None))
    trained, untrained = (line for line in lines if line.startswith("ZeRO"))
    assert "stage 0, 1 rank, fp32, FusedAdam on" in trained
    assert "31 parameters in 1 unit;" in trained
    assert "batch 2 = 2 x 1 micro-batch x 1 rank" in trained
    assert "no optimizer" in untrained and "nothing is trained" in untrained
    for line in (trained, untrained):
        assert not re.search(r"nothing: one process|\b1 \w+s\b|\b0 (units|parameters)", line), line


# -- the loss


class Dictated(Regression):
    """Its loss is off by what the batch says, which no gradient sees."""

    def forward(self, x: Tensor, off: float) -> Tensor:
        return super().forward(x) + off


@pytest.mark.parametrize("late", [False, True], ids=["cpu", "as on a GPU"])
def test_the_progress_line_has_the_mean_loss_of_the_micro_batches(lines, late):
    settings = config(gradient_accumulation_steps=2, steps_per_print=1)
    with on_late_streams() if late else nullcontext():
        engine = partita.Engine(seeded(Dictated), config=settings)
        losses = []
        for step in range(3):
            for off in (1.0, 2.0):
                losses.append(engine.backward(engine(inputs(step), off)).item())
                engine.step()
        engine.backward(engine(inputs(), 1e6))  # of no step: dropped
        engine.zero_grad()
        engine.destroy()
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    reported = [float(re.search(r"  loss (\S+)  ", line).group(1)) for line in lines if "ms/step" in line]
    assert reported == pytest.approx(means, abs=1e-4)


def test_a_loss_that_the_engine_never_saw_has_no_place_in_the_line(lines):
    engine = partita.Engine(seeded(), config=config(steps_per_print=1))
    engine(inputs()).backward()
    engine.step()
    assert " loss " not in lines[-1] and "grad norm" in lines[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_while_gradients_are_is_told_and_not_too_often(lines, value):
    engine = partita.Engine(seeded(Dictated), config=config())
    for step in range(22):
        engine.backward(engine(inputs(step), value if step else 0.0))
        engine.step()
    told = [line for line in lines if "the loss is" in line]
    assert engine.skipped_steps == 0
    assert [int(re.search(r"step (\d+)", line).group(1)) for line in told] == [2, 3, 4, 5, 6, 11, 21]
    assert all(f"the loss is {value:g}" in line and "weights were updated" in line for line in told)
    assert [line for line in told if "every tenth" in line] == [told[4]]


# -- the end


@pytest.mark.parametrize("micro_batches", [3, 4])
def test_a_run_that_ends_within_a_step_is_told_what_it_has_lost(lines, micro_batches):
    engine = partita.Engine(seeded(), config=config(gradient_accumulation_steps=2))
    for step in range(micro_batches):
        engine.backward(engine(inputs(step)))
        engine.step()
    engine.destroy()
    told = [line for line in lines if "the run ends 1 micro-batch into a step of 2" in line]
    assert len(told) == micro_batches % 2


# -- skipped steps


class Poisoned(Regression):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}], ids=str)
def test_the_first_five_skips_are_told_and_then_every_tenth(lines, precision):
    """Without a loss scale where there is none."""
    engine = partita.Engine(seeded(Poisoned), config=config(max_consecutive_skipped_steps=100, **precision))
    with pytest.raises(FloatingPointError) if "fp16" in precision else nullcontext():
        for step in range(31):
            engine.train_batch(inputs(step))
    told = [line for line in lines if "skipped: the gradients are not finite" in line]
    steps = [int(re.search(r"step (\d+)", line).group(1)) for line in told]
    assert steps == [step for step in range(1, engine.global_steps + 1) if step <= 5 or step % 10 == 0]
    assert all(("loss scale now" in line) == ("fp16" in precision) for line in told)
    assert [line for line in told if "every tenth" in line] == [told[4]]


def test_the_end_of_a_run_that_only_skips_says_what_to_do():
    engine = partita.Engine(seeded(Poisoned), config=config(max_consecutive_skipped_steps=1))
    with pytest.raises(FloatingPointError, match=r"rank 0, first in parameter '\w+\.\w+'.*anomaly.*learning rate"):
        engine.train_batch(inputs())


# -- schedules


def of_config() -> dict[str, Any]:
    return {"config": config(scheduler=WARMUP)}


def of_torch() -> dict[str, Any]:
    return {"config": config(), "lr_scheduler": lambda optimizer: StepLR(optimizer, 1)}


@pytest.mark.parametrize("make", [of_config, of_torch])
def test_a_schedule_that_the_program_steps_too_is_told_once(lines, make: Callable[[], dict[str, Any]]):
    engine, _, _, scheduler = partita.initialize(seeded(), **make())
    for step in range(5):
        engine.train_batch(inputs(step))
        scheduler.step()
    (line,) = (line for line in lines if "lr_scheduler.step()" in line)
    assert "moves twice" in line and "remove the call" in line


class Uncounted:
    """A schedule that does not say where it is."""

    def step(self) -> None:
        pass


@pytest.mark.parametrize("make", [of_config, of_torch])
def test_a_schedule_whose_state_is_loaded_is_left_alone(lines, make: Callable[[], dict[str, Any]]):
    engine, _, _, scheduler = partita.initialize(seeded(), **make())
    state = scheduler.state_dict()
    for step in range(3):
        engine.train_batch(inputs(step))
    scheduler.load_state_dict(state)
    for step in range(3):
        engine.train_batch(inputs(step))
    assert not [line for line in lines if "lr_scheduler" in line]


def test_a_schedule_without_a_count_is_stepped_all_the_same(lines):
    engine = partita.Engine(seeded(), config=config(), lr_scheduler=Uncounted())
    for step in range(3):
        engine.train_batch(inputs(step))
    assert engine.global_steps == 3 and not [line for line in lines if "lr_scheduler" in line]


def _loss_on_two_ranks(value: float) -> list[str]:
    with logged() as said:
        engine = partita.Engine(seeded(Dictated), config=config(steps_per_print=1))
        engine.backward(engine(inputs(), value if engine.global_rank else 1.0))
        engine.step()
        engine.destroy()
    return said


def test_the_loss_is_the_mean_over_ranks_and_one_that_is_not_finite_is_seen_from_rank_0(ranks):
    with torch.no_grad():
        plain = seeded()(inputs()).item()
    finite, nan = (ranks(2).run(_loss_on_two_ranks, value) for value in (4.0, float("nan")))
    assert f"  loss {plain + 2.5:.4f}  " in finite[0][-1]
    assert [line for line in nan[0] if "step 1: the loss is nan" in line]
    assert not finite[1] and not nan[1]
