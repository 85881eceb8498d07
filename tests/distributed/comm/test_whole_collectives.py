"""Training over whole collectives of a backend, as over NCCL: the same bits in all stages, and sums in float16."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from support import base_config, train
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
OVER_TORCH = {"comm": {"transport": "torch"}}
Outcome = tuple[list[float], dict[str, Tensor], list[float]]


def _train(whole: bool, stage: int, precision: str) -> Outcome:
    config = base_config(stage=stage, gradient_clipping=0.5, **PRECISIONS[precision])
    if not whole:
        return train(config, steps=5)
    with inside.whole_collectives():
        return train({**config, **OVER_TORCH}, steps=5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_two_ranks_train_the_same_bits_in_all_stages(ranks, precision):
    """Two numbers have one sum. Those of the default transport, too: what fp16 is divided by changes no bit."""
    expected = ranks(2).run(_train, False, 0, precision)
    for stage in STAGES:
        for run, other in zip(ranks(2).run(_train, True, stage, precision), expected, strict=True):
            assert run[0] == other[0], stage
            assert all(torch.equal(value, other[1][name]) for name, value in run[1].items()), stage


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_three_ranks_train_alike(ranks, stage, precision):
    """In another order of sums."""
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    expected = ranks(3).run(_train, False, stage, precision)
    for run, other in zip(ranks(3).run(_train, True, stage, precision), expected, strict=True):
        torch.testing.assert_close(run[0], other[0], rtol=tolerance, atol=tolerance)
        for name, value in run[1].items():
            torch.testing.assert_close(value, other[1][name], rtol=tolerance, atol=tolerance)


# -- sums in float16

GRADIENT = 40_000.0  # of each element on each rank: two of them are more than float16 has


class _Steep(nn.Module):
    """A loss whose gradients are all `GRADIENT`, with a loss scale of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7))

    def forward(self, _: Tensor) -> Tensor:
        return (self.weight * GRADIENT).sum()


def _steep(whole: bool, stage: int, fp16: dict[str, Any], **changes: Any) -> tuple[float, list[float], int]:
    """The factor before the sum; the weights after a step of SGD with learning rate 2^-16; skipped steps."""
    optimizer = {"type": "SGD", "params": {"lr": 2.0**-16}}
    config = base_config(stage=stage, optimizer=optimizer, fp16={"enabled": True, **fp16}, **changes, **OVER_TORCH)
    config["fp16"].setdefault("initial_scale_power", 0)
    if whole:
        with inside.whole_collectives():
            engine = partita.Engine(_Steep(), config=config)
    else:
        engine = partita.Engine(_Steep(), config=config)
    engine.train_batch((torch.zeros(2, 1, dtype=torch.float16),))
    weights = engine.module_state_dict()["weight"].float().tolist()
    found = inside.predivide(engine), weights, engine.skipped_steps
    engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_in_float16_do_not_overflow_before_their_mean_does(ranks, world_size):
    """Where the transport adds in float16 and the loss scale is dynamic."""
    moved = [-GRADIENT * 2.0**-16] * 7
    for stage in STAGES if world_size == 2 else (2,):
        for factor, weights, skipped in ranks(world_size).run(_steep, True, stage, {}):
            assert (factor, skipped) == (2.0, 0)
            assert weights == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    ("whole", "fp16", "changes", "factor"),
    [
        (True, {"loss_scale": 1.0}, {}, 1.0),  # a fixed scale would not rise by what the division takes
        (False, {}, {}, 1.0),  # the transport adds in float32
        (True, {}, {"prescale_gradients": True, "gradient_predivide_factor": 1.5}, 1.5),  # the program says it
    ],
)
def test_gradients_are_not_divided_where_that_loses_something_or_gains_nothing(ranks, whole, fp16, changes, factor):
    for found, _, skipped in ranks(2).run(_steep_with, whole, fp16, changes):
        assert (found, skipped) == (factor, int(factor == 1.0))


def _steep_with(whole: bool, fp16: dict[str, Any], changes: dict[str, Any]) -> tuple[float, list[float], int]:
    return _steep(whole, 2, fp16, **changes)


def _in_float32(changes: dict[str, Any]) -> float:
    with inside.whole_collectives():
        engine = partita.Engine(_Steep(), config=base_config(stage=1, **changes, **OVER_TORCH))
    predivide = inside.predivide(engine)
    engine.destroy()
    return predivide


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True}, "communication_data_type": "fp32"},
        {"fp16": {"enabled": True}, "gradient_accumulation_steps": 2},
        {"communication_data_type": "fp16"},  # nothing scales the loss
    ],
)
def test_other_sums_are_not_divided(ranks, changes):
    assert ranks(2).run(_in_float32, changes) == [1.0, 1.0]
