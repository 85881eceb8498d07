"""The loss scale's table, unscaling and clipping, and the reported gradient norm."""

from __future__ import annotations

import math
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import PRECISIONS, Dictated, assert_follows, config_for, dictate, masters, merged, plain, share, take_step
from partita.config import ConfigError, load_config
from support import base_config, train, train_plain
from torch import nn

STAGES = (0, 1, 2, 3)
SGD = {"type": "SGD", "params": {"lr": 0.5, "momentum": 0.5}}  # unlike Adam it shows a wrong factor on all gradients
SETTINGS: dict[str, dict[str, Any]] = {
    **PRECISIONS,
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": {"initial_scale_power": 8}},
    "prescaled": {"prescale_gradients": True},
    "predivided": {"prescale_gradients": True, "gradient_predivide_factor": 4.0, "bf16": {"enabled": True}},
    "accumulated": {"gradient_accumulation_steps": 4, "fp16": {"enabled": True, "initial_scale_power": 8}},
    "all-reduced": {"zero_optimization": {"stage": 2, "reduce_scatter": False, "reduce_bucket_size": 40}},
}

# What happens to (scale, hysteresis, good steps) in steps that overflow (x) or not (.); DeepSpeed's rules:
# an overflow uses up hysteresis, then halves the scale; a good step after `loss_scale_window` good ones doubles the
# scale and is the first of the next window. The scales and hystereses are those of DeepSpeed 0.19.8 on the same steps.
SCALE_TABLE: dict[str, tuple[dict[str, Any], str, list[tuple[float, int, int]]]] = {
    "defaults start at 2^16 and forgive one overflow": (
        {},
        "xx.x",
        [(65536, 1, 0), (32768, 1, 0), (32768, 1, 1), (16384, 1, 0)],
    ),
    "a good step after a window of good steps doubles the scale and restores the hysteresis": (
        {"initial_scale_power": 4, "loss_scale_window": 3},
        "x....xx....x",
        [
            (16, 1, 0),
            (16, 1, 1),
            (16, 1, 2),
            (16, 1, 3),
            (32, 2, 1),
            (32, 1, 0),
            (16, 1, 0),
            (16, 1, 1),
            (16, 1, 2),
            (16, 1, 3),
            (32, 2, 1),
            (32, 1, 0),
        ],
    ),
    "the scale doubles in step window + 1, then after every window": (
        {"initial_scale_power": 8, "loss_scale_window": 2},
        "......",
        [(256, 2, 1), (256, 2, 2), (512, 2, 1), (512, 2, 2), (1024, 2, 1), (1024, 2, 2)],
    ),
    "an overflow starts the window anew": (
        {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1},
        ".x.x...",
        [(16, 1, 1), (8, 1, 0), (8, 1, 1), (4, 1, 0), (4, 1, 1), (4, 1, 2), (8, 1, 1)],
    ),
    "consecutive hysteresis is restored by every good step": (
        {"initial_scale_power": 4, "hysteresis": 3, "consecutive_hysteresis": True},
        "xx.xxx.",
        [(16, 2, 0), (16, 1, 0), (16, 3, 1), (16, 2, 0), (16, 1, 0), (8, 1, 0), (8, 3, 1)],
    ),
    "hysteresis is not restored by good steps otherwise": (
        {"initial_scale_power": 4, "hysteresis": 3},
        "xx.xx",
        [(16, 2, 0), (16, 1, 0), (16, 1, 1), (8, 1, 0), (4, 1, 0)],
    ),
    "a minimum that is no power of two is kept": (
        {"initial_scale_power": 3, "hysteresis": 1, "min_loss_scale": 3.0},
        "xx",
        [(4, 1, 0), (3, 1, 0)],
    ),
    "the scale does not grow beyond 2^24": (
        {"initial_scale_power": 24, "loss_scale_window": 1},
        "...",
        [(2**24, 2, 1), (2**24, 2, 1), (2**24, 2, 1)],
    ),
    "a fixed scale stays": ({"loss_scale": 96.0}, "xx.", [(96, 2, 0), (96, 2, 0), (96, 2, 1)]),
}


def _scales(fp16: dict[str, Any], pattern: str) -> tuple[list[tuple[float, int, int]], str]:
    """(scale, hysteresis, good steps) after each step, and the text of the error that ended the run."""
    engine = partita.Engine(model=Dictated(), config=config_for(1, optimizer=SGD, fp16={"enabled": True, **fp16}))
    rows = []
    for event in pattern:
        loss = engine(dictate(0))
        overflows = event == "x" and engine.global_rank == engine.world_size - 1
        engine.backward(loss * (float("inf") if overflows else 0.0))
        try:
            engine.step()
        except FloatingPointError as error:
            return rows, str(error)
        state = inside.loss_scale(engine)
        good_steps = state.good_steps if fp16.get("loss_scale") is None else state.applied_steps
        rows.append((engine.loss_scale, state.hysteresis, good_steps))
    return rows, ""


@pytest.mark.parametrize("case", SCALE_TABLE)
def test_the_loss_scale_follows_the_table(ranks, case):
    """N3: overflows on the last rank; all ranks agree."""
    fp16, pattern, expected = SCALE_TABLE[case]
    for rows, error in ranks(2).run(_scales, fp16, pattern):
        assert rows == expected
        assert error == ""


@pytest.mark.parametrize(("pattern", "last_allowed"), [("xxxxx", 3), ("...xxxxx", 7)])
def test_overflowing_at_the_minimum_is_an_error(ranks, pattern, last_allowed):
    """N3: reaching the minimum is allowed, overflowing there is not; the hysteresis counts first."""
    fp16 = {"initial_scale_power": 2, "min_loss_scale": 1.0, "loss_scale_window": 2}
    for rows, error in ranks(2).run(_scales, fp16, pattern):
        assert len(rows) == last_allowed
        assert rows[-1] == (1.0, 1, 0)
        assert "loss scale is at its minimum, 1," in error
        assert "rank 1, first in parameter 'e'" in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initial_scale_power", -1),
        ("loss_scale", -1.0),
        ("loss_scale", math.inf),
        ("loss_scale_window", 0),
        ("hysteresis", 0),
        ("min_loss_scale", 0.0),
        ("min_loss_scale", 2.0**17),
        ("min_loss_scale", math.nan),
    ],
)
def test_bad_ranges_are_refused_by_name(key, value):
    """N3."""
    with pytest.raises(ConfigError, match=key):
        load_config({"fp16": {"enabled": True, key: value}})


def _clipped(config: dict[str, Any], steps: int) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    engine = partita.Engine(model=Dictated(), config=config)
    norms, scales = [], []
    for step in range(steps):
        take_step(engine, dictate(step))
        norms.append(engine.get_global_grad_norm())
        scales.append(engine.loss_scale)
    return masters(engine), norms, scales


@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [0.25, 1e6])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_unscaled_then_clipped_as_in_torch(ranks, stage, kind, clip):
    """N4, N5: the norm is that before clipping, without the loss scale."""
    results = ranks(2).run(_clipped, config_for(stage, optimizer=SGD, gradient_clipping=clip, **SETTINGS[kind]), 5)
    expected, expected_norms = plain(_sgd, [dictate(step) for step in range(5)], clip=clip)
    assert_follows(merged([r[0] for r in results]), expected)
    for _, norms, _ in results:
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", [SGD, {"type": "AdamW", "params": {"lr": 0.1}}], ids=["SGD", "AdamW"])
def test_a_power_of_two_scale_changes_no_bit(ranks, stage, optimizer):
    """N4: the scale doubles in every second step, which clips too; the same bits as with the fixed scale 1."""
    runs = []
    for fp16 in ({"initial_scale_power": 3, "loss_scale_window": 2}, {"loss_scale": 1.0}):
        config = config_for(stage, optimizer=optimizer, fp16={"enabled": True, **fp16}, gradient_clipping=0.25)
        runs.append(ranks(2).run(_clipped, config, 6))
    assert runs[0][0][2] == [8.0, 8.0, 16.0, 16.0, 32.0, 32.0]
    assert runs[1][0][2] == [1.0] * 6
    for dynamic, fixed in zip(*runs, strict=True):
        assert dynamic[1] == fixed[1]
        for name, value in fixed[0].items():
            assert torch.equal(dynamic[0][name].view(torch.int32), value.view(torch.int32)), name


@pytest.mark.pairwise
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_norm_is_that_of_the_big_batch(ranks, stage, world_size, precision):
    """N5: one number for every stage, dtype and world size; the model has tied weights, and clipping is on."""
    config = base_config(
        stage=stage, train_micro_batch_size_per_gpu=12 // world_size, gradient_clipping=0.01, **PRECISIONS[precision]
    )
    _, _, (expected, *_) = train_plain(12, steps=1)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[precision]
    for _, _, norms in ranks(world_size).run(train, config, 1):
        assert norms == pytest.approx([expected], rel=tolerance)


def _norm_before_and_without_steps() -> list[float | None]:
    engine = partita.Engine(model=Dictated(), config=config_for(optimizer=SGD, gradient_accumulation_steps=2))
    norms = [engine.get_global_grad_norm()]
    for _ in range(2):
        engine.backward(engine(dictate(0)))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    return norms


def test_there_is_no_norm_before_the_first_update(ranks):
    """N5."""
    before, accumulating, after = ranks(1).run(_norm_before_and_without_steps)[0]
    assert before is None
    assert accumulating is None
    assert after == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in dictate(0).values())), rel=1e-6)


def _few_elements(config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    shapes = {"only": (2,)}
    engine = partita.Engine(model=Dictated(shapes), config=config)
    norms = []
    for step in range(3):
        grads = {"only": torch.tensor([1.0, -2.0]) * (step + 1)}
        engine.backward(engine(share(grads, engine.global_rank, engine.world_size)))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    return masters(engine), norms, [len(unit.layout.slices(unit.own)) for unit in inside.units(engine)]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_without_parameters_in_its_shard(ranks, stage, kind):
    """N6: two elements on four ranks; only rank 0 has some."""
    optimizer = {"type": kind, "params": {"lr": 0.1, "weight_decay": 0.1}}
    results = ranks(4).run(_few_elements, config_for(stage, "bf16", optimizer=optimizer, gradient_clipping=1.0))
    assert [r[2] for r in results] == [[1], [0], [0], [0]]
    module = Dictated({"only": (2,)})
    reference = getattr(torch.optim, kind)(module.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        module.only.grad = torch.tensor([1.0, -2.0]) * (step + 1)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        reference.step()
    assert_follows(merged([r[0] for r in results]), {"only": module.only.detach()})
    for _, norms, _ in results:
        assert norms == pytest.approx([math.sqrt(5) * (step + 1) for step in range(3)], rel=1e-6)
