"""Promises 1, 2 and 4 of the design: stages agree bit for bit, and with plain PyTorch; parameters are views."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from support import (
    OddModel,
    assert_absent,
    assert_without_values,
    base_config,
    global_batch,
    make_model,
    part,
    train,
    train_plain,
)

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by up to {(a[name] - b[name]).abs().max()}"


def sums_in_rank_order(transport: str, world_size: int) -> bool:
    """Gloo's all-reduce adds in an order of its own, which two ranks cannot tell."""
    return transport == "auto" or world_size <= 2


def assert_same_runs(run: Any, expected: Any, *, bits: bool) -> None:
    """Losses, norms and weights of every rank; without `bits`, up to the order of sums.

    The odd model has no blocks, so its units, and with them the order of the norm's sum, are the same in stage 3.
    """
    for (losses, weights, norms), (expected_losses, expected_weights, expected_norms) in zip(
        run, expected, strict=True
    ):
        if bits:
            assert losses == expected_losses
            assert norms == expected_norms
            assert_same_bits(weights, expected_weights)
        else:
            torch.testing.assert_close(losses, expected_losses, rtol=3e-2, atol=1e-3)
            torch.testing.assert_close(norms, expected_norms, rtol=5e-2, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("world_size", "clip"), [(2, 0.0), (2, 0.5), (3, 0.5), (4, 0.5)])
def test_stages_have_the_same_bits(ranks, transport, precision, world_size, clip):
    """Promise 1. With one micro-batch the order of all sums is the same in all stages."""
    runs = [
        ranks(world_size).run(train, base_config(stage=s, gradient_clipping=clip, **PRECISIONS[precision]))
        for s in STAGES
    ]
    for stage in (1, 2, 3):
        assert_same_runs(runs[stage], runs[0], bits=sums_in_rank_order(transport, world_size))
    for run in runs:
        for _, weights, _ in run[1:]:
            assert_same_bits(weights, run[0][1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bucket", [1, 60, 10**6])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_stages_have_the_same_bits_with_any_bucket(ranks, transport, world_size, bucket, precision):
    """Promise 1, from one parameter per bucket to all in one."""
    changes = {"reduce_bucket_size": bucket, **PRECISIONS[precision]}
    runs = [ranks(world_size).run(train, base_config(stage=s, **changes)) for s in STAGES]
    for stage in (1, 2, 3):
        assert_same_runs(runs[stage], runs[0], bits=sums_in_rank_order(transport, world_size))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_stages_have_the_same_bits_on_shards_of_several_pages(ranks, transport, world_size, precision):
    """Promise 1, where every rank has parts of parameters that share memory; above, most lie in rank 0's page."""
    changes = {"gradient_clipping": 0.5, **PRECISIONS[precision]}
    runs = [ranks(world_size).run(_train_wide, base_config(stage=s, **changes)) for s in STAGES]
    for stage in (1, 2, 3):
        assert_same_runs(runs[stage], runs[0], bits=sums_in_rank_order(transport, world_size))


def _train_wide(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return train(config, 3, OddModel(width=101))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_stages_0_and_1_have_the_same_bits_with_accumulation(ranks, transport, world_size):
    """Stage 2 reduces every micro-batch, so it adds in another order; 0 and 1 add micro-batches first."""
    runs = [ranks(world_size).run(train, base_config(stage=s, gradient_accumulation_steps=3)) for s in STAGES]
    if sums_in_rank_order(transport, world_size):
        assert_same_runs(runs[1], runs[0], bits=True)
    for run in runs[1:]:
        for name, value in run[0][1].items():
            torch.testing.assert_close(value, runs[0][0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_one_big_batch_in_plain_pytorch(ranks, stage, world_size, accumulation, clip):
    """Promise 2: k micro-batches x N ranks = one batch on one process."""
    config = base_config(stage=stage, gradient_accumulation_steps=accumulation, gradient_clipping=clip)
    runs = ranks(world_size).run(train, config)
    losses, weights, norms = train_plain(2 * accumulation * world_size, clip=clip)
    mean_losses = [sum(step) / world_size for step in zip(*(run[0] for run in runs), strict=True)]
    torch.testing.assert_close(mean_losses, losses, rtol=1e-4, atol=1e-5)
    for run in runs:
        torch.testing.assert_close(run[2], norms, rtol=1e-4, atol=1e-6)
        for name, value in run[1].items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_follows_fp32(ranks, stage, precision):
    """Promise 2 for 16-bit parameters, within what their rounding allows."""
    config = base_config(stage=stage, gradient_accumulation_steps=2, gradient_clipping=0.5, **PRECISIONS[precision])
    runs = ranks(2).run(train, config)
    losses, _, _ = train_plain(8, clip=0.5)
    mean_losses = [sum(step) / 2 for step in zip(*(run[0] for run in runs), strict=True)]
    tolerance = 0.03 if precision == "bf16" else 0.005
    torch.testing.assert_close(mean_losses, losses, rtol=tolerance, atol=tolerance)


def _views(stage: int) -> None:
    model = make_model()
    engine = partita.Engine(model=model, config=base_config(stage=stage))
    if stage == 3:
        _views_of_shards(engine)
        return
    storages = {unit.params.untyped_storage().data_ptr() for unit in inside.units(engine)}
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in storages, name
    for unit in inside.units(engine):
        # fp32: the master is the parameter; the shard is a slice of the full buffer; reduced gradients of theirs
        assert unit.master.untyped_storage().data_ptr() == unit.params.untyped_storage().data_ptr()
        assert unit.master.data_ptr() == unit.params.data_ptr() + 4 * unit.own.start
        if unit.full_grads is not None:
            assert unit.reduced.data_ptr() == unit.full_grads.data_ptr() + 4 * unit.own.start
    assert model.head.weight is model.embed.weight
    engine.destroy()


def _views_of_shards(engine: partita.Engine) -> None:
    """In stage 3 a parameter has no memory but while it computes, when it lies in its unit's full buffer."""
    model, seen = engine.module, set()
    unit_of = {p: unit for unit in inside.units(engine) for p in unit.parameters}

    def note(*_: Any) -> None:
        for p, unit in unit_of.items():
            offset = next(s.offset for s, q in zip(unit.layout.slots, unit.parameters, strict=True) if q is p)
            seen.add(p.data_ptr() == unit.params.data_ptr() + 4 * offset)

    model.norm.register_forward_hook(note)
    places = {name: p.untyped_storage()._cdata for name, p in model.named_parameters()}
    engine.train_batch(part(global_batch(0, engine.train_batch_size()), engine.global_rank, engine.world_size))
    assert seen == {True}
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == 0, name
        assert parameter.untyped_storage()._cdata == places[name], name
    assert_absent(model)
    for unit in inside.units(engine):
        assert len(unit.own_params) == len(unit.own) == unit.layout.shard_numel
        assert unit.master.data_ptr() == unit.own_params.data_ptr()
        mapped = unit.params.untyped_storage().nbytes() > 0
        assert not mapped or unit.own_params.data_ptr() == unit.params.data_ptr() + 4 * unit.own.start
        assert unit.full_grads is None
    assert model.head.weight is model.embed.weight
    engine.destroy()
    assert_without_values(model)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_and_shards_are_views(ranks, stage):
    """Promise 4."""
    ranks(2).run(_views, stage)
