"""Tied weights on several stages: their copies stay equal bit for bit, and are trained as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import partita
import pytest
import torch
from partita.pipeline import PipelineModule
from pipelines import PRECISIONS, Shape, config_for, micro_batch
from ranks import RankError
from torch import Tensor, nn

STEPS = 20
FIRST, LAST = "0.weight", "7.weight"  # of the model with six blocks
# The first steps overflow.
OVERFLOWING = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 4, "hysteresis": 1}}


def _train(make: Callable[[], PipelineModule], config: dict[str, Any]) -> dict[str, Any]:
    """The copies of this rank by name: values that the model computes with, and all that is kept of them."""
    engine, *_ = partita.initialize(model=make(), config=config)
    count = engine.gradient_accumulation_steps()
    copies = engine.train_batch_size() // (count * 3)
    norms = []
    for step in range(STEPS):
        engine.train_batch(iter([micro_batch(step, copies * m + engine.global_rank % copies) for m in range(count)]))
        norms.append(engine.get_global_grad_norm())
    weights = {name: value.float() for name, value in engine.module_state_dict().items()}
    kept = {
        (quantity.name, s.slot.name): quantity.read()[s.in_shard].clone()
        for quantity in engine.train_state().quantities()
        for s in quantity.slices
        if s.slot.name in (FIRST, LAST) and s.numel == s.slot.numel
    }
    skipped = engine.skipped_steps
    engine.destroy()
    return {"weights": weights, "kept": kept, "norms": norms, "skipped": skipped}


def _config(schedule: str, stage: int, precision: dict[str, Any]) -> dict[str, Any]:
    return config_for(
        4,
        **{"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, **precision},
        pipeline={"schedule": schedule},
        zero_optimization={"stage": stage, "reduce_bucket_size": 400},
        gradient_clipping=0.3,
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("precision", ["fp32", "bf16", "split", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v"])
@pytest.mark.parametrize("copies", [1, 2])
def test_copies_stay_equal(ranks, copies, schedule, stage, precision):
    """P2: 20 steps, clipped; in float16 some of them are skipped."""
    config = _config(schedule, stage, OVERFLOWING if precision == "fp16" else PRECISIONS[precision])
    by_rank = ranks(2 * copies).run(_train, partial(Shape(tied=True).module, 2), config)
    weights: dict[str, Tensor] = {}
    kept: dict[tuple[str, str], Tensor] = {}
    for one in by_rank:
        for name, value in one["weights"].items():
            assert torch.equal(weights.setdefault(name, value), value), name
        kept |= one["kept"]
        assert str(one["norms"]) == str(by_rank[0]["norms"])  # nan, too
    assert torch.equal(weights[FIRST], weights[LAST])
    kinds = {kind for kind, _ in kept}
    if stage == 0:
        assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(kept[kind, FIRST], kept[kind, LAST]) for kind in kinds)
    if copies == 1:
        (alone,) = ranks(1).run(
            _train, partial(Shape(tied=True).module, 1), {**config, "pipeline": {"schedule": "1f1b"}}
        )
        assert by_rank[0]["skipped"] == alone["skipped"]
        assert (alone["skipped"] > 0) == (precision == "fp16")
        tolerance = 1e-4 if precision == "fp32" else 0.05
        assert by_rank[0]["norms"][-1] == pytest.approx(alone["norms"][-1], rel=max(tolerance, 1e-3), nan_ok=True)
        torch.testing.assert_close(weights[FIRST], alone["weights"][FIRST], rtol=tolerance, atol=tolerance)


def test_the_values_are_those_of_the_first_stage(ranks):
    """Also where the ranks have other random numbers, and the copies were made by hand."""
    for first, last in [ranks(2).run(_initial)]:
        assert torch.equal(first[FIRST], last[LAST])


def _initial() -> dict[str, Tensor]:
    torch.manual_seed(torch.distributed.get_rank())
    model = PipelineModule(Shape(tied=True).specs(), 2, loss_fn=nn.functional.cross_entropy, partition_method="uniform")
    engine, *_ = partita.initialize(model=model, config=config_for(2))
    values = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return values


def _grouped() -> None:
    model = Shape(tied=True).module(2)
    groups = [{"params": [], "lr": 0.1}, {"params": [], "lr": 0.2}]
    for name, parameter in model.named_parameters():
        groups[name == LAST]["params"].append(parameter)
    partita.initialize(model=model, model_parameters=groups, config=config_for(2))


def test_copies_are_in_one_param_group(ranks):
    with pytest.raises(RankError, match=f"'{FIRST}' in group 0, '{LAST}' in group 1.*same one"):
        ranks(2).run(_grouped)


def _frozen(ranks_that_freeze: set[int]) -> list[float]:
    engine, *_ = partita.initialize(model=Shape(tied=True).module(2), config=config_for(2))
    before = {name: value.clone() for name, value in engine.module_state_dict().items()}
    if engine.global_rank in ranks_that_freeze:
        for name, parameter in engine.module.named_parameters():
            parameter.requires_grad_(name not in (FIRST, LAST))
    engine.train_batch(iter([micro_batch(0, m) for m in range(2)]))
    after = engine.module_state_dict()
    moved = [float(not torch.equal(before[name], after[name])) for name in before if name in (FIRST, LAST)]
    engine.destroy()
    return moved


def test_copies_are_frozen_together(ranks):
    assert ranks(2).run(_frozen, {0, 1}) == [[0.0], [0.0]]
    assert ranks(2).run(_frozen, set()) == [[1.0], [1.0]]
    with pytest.raises(RankError, match=rf"copies of a tied.*'{FIRST}' in stage 0, '{LAST}' in stage 1.*requires_grad"):
        ranks(2).run(_frozen, {1})
