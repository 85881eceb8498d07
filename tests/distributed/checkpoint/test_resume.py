"""C9: a run that goes on from a checkpoint makes the steps of the run that was not broken off."""

from __future__ import annotations

from typing import Any

import pytest
from resumed import BATCH, config_for, engine_for, take_steps

BEFORE, AFTER = 3, 6  # steps; an epoch has 4


def _unbroken(folder: str, config: dict[str, Any], noise: bool) -> dict[str, Any]:
    engine = engine_for(config, seed=1, noise=noise, by_batch=noise)
    take_steps(engine, BEFORE)
    engine.save_checkpoint(folder)
    found = take_steps(engine, AFTER)
    engine.destroy()
    return found


def _resumed(folder: str, config: dict[str, Any], noise: bool) -> dict[str, Any]:
    engine = engine_for(config, seed=2, noise=noise, by_batch=noise)
    engine.load_checkpoint(folder)
    found = take_steps(engine, AFTER)
    engine.destroy()
    return found


@pytest.mark.parametrize("precision", ["fp32", "split", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_ranks_make_the_same_steps(ranks, tmp_path, stage, precision):
    """Losses with random numbers of three generators, norms, learning rates and samples, across an epoch's end."""
    config = config_for(2, stage, precision, gradient_clipping=0.5)
    arguments = (str(tmp_path), config, True)
    unbroken, resumed = ranks(2).run(_unbroken, *arguments), ranks(2).run(_resumed, *arguments)
    assert resumed == unbroken
    assert len({tuple(samples) for samples in unbroken[0]["samples"]}) == AFTER


def _samples(found: list[dict[str, Any]], step: int) -> list[int]:
    return sorted(sample for rank in found for sample in rank["samples"][step])


def _loss(found: list[dict[str, Any]], step: int) -> float:
    return sum(rank["losses"][step] for rank in found) / len(found)


@pytest.mark.parametrize(("before", "after"), [((1, 0), (3, 2)), ((3, 3), (2, 1)), ((2, 2), (1, 3))])
def test_other_ranks_see_the_same_samples(ranks, tmp_path, before, after):
    """Losses agree within rounding."""
    unbroken = ranks(before[0]).run(_unbroken, str(tmp_path), config_for(*before, "fp32"), False)
    resumed = ranks(after[0]).run(_resumed, str(tmp_path), config_for(*after, "fp32"), False)
    for step in range(AFTER):
        assert _samples(resumed, step) == _samples(unbroken, step)
        assert len(_samples(resumed, step)) == BATCH
        assert _loss(resumed, step) == pytest.approx(_loss(unbroken, step), rel=1e-5)
        assert resumed[0]["lr"] == unbroken[0]["lr"]


def _micro_batches(folder: str, config: dict[str, Any], loads: bool) -> tuple[int, int, list[list[int]]]:
    engine = engine_for(config, seed=1)
    if loads:
        engine.load_checkpoint(folder)
    found = take_steps(engine, 2)
    if not loads:
        engine.save_checkpoint(folder)
    seen = (engine.global_steps, engine.global_samples, found["samples"])
    engine.destroy()
    return seen


def test_another_number_of_micro_batches_begins_with_a_whole_step(ranks, tmp_path):
    first = config_for(1, 0, "fp32", train_micro_batch_size_per_gpu=2)  # six micro-batches
    ranks(1).run(_micro_batches, str(tmp_path), first, False)
    second = config_for(1, 0, "fp32", train_micro_batch_size_per_gpu=3)
    ((steps, samples, seen),) = ranks(1).run(_micro_batches, str(tmp_path), second, True)
    assert (steps, samples) == (4, 4 * BATCH)
    assert [len(step) for step in seen] == [BATCH, BATCH]


def _random_numbers(folder: str, config: dict[str, Any], loads: bool) -> list[float]:
    import random

    import numpy as np
    import torch

    engine = engine_for(config, seed=3)
    if loads:
        engine.load_checkpoint(folder)
    else:
        engine.save_checkpoint(folder)
    drawn = [random.random(), float(np.random.rand()), torch.rand(()).item()]
    engine.destroy()
    return drawn


def test_other_ranks_draw_new_numbers_and_always_the_same(ranks, tmp_path):
    """A rank that was not there has no state to go on from; ranks must not draw alike."""
    ranks(2).run(_random_numbers, str(tmp_path), config_for(2, 1, "fp32"), False)
    config = config_for(3, 1, "fp32")
    drawn = ranks(3).run(_random_numbers, str(tmp_path), config, True)
    assert drawn == ranks(3).run(_random_numbers, str(tmp_path), config, True)
    assert len({number for rank in drawn for number in rank}) == 9
