"""`GatheredParameters`: whole parameters to read and to write, in every stage; different work of ranks inside."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from blocks_model import (
    TRANSPORTS,
    assert_same_weights,
    batch_of,
    config_for,
    error_of,
    make_blocks,
    take_step,
)
from dictated import masters, merged
from partita.zero import AbsentParameterError, GatheredParameters
from torch import Tensor, nn

through_both = pytest.mark.parametrize("path", TRANSPORTS)
PLACES = [(0, "shared_memory"), (1, "shared_memory"), (2, "torch"), (3, "shared_memory"), (3, "torch")]
in_every_stage = pytest.mark.parametrize(("stage", "path"), PLACES)


def _edited(model: Any) -> list[nn.Parameter]:
    return [model.body.embed.weight, model.body.blocks[1].mix.weight, model.body.blocks[2].norm.bias, model.body.scale]


@torch.no_grad()
def _edit(parameters: list[nn.Parameter]) -> None:
    parameters[0].mul_(2)
    parameters[1][3] = 5.0
    parameters[2].add_(0.1)
    parameters[3].copy_(torch.full((1,), 0.7))


def _trained_after_an_edit(stage: int, transport: str, precision: str, gathers: bool) -> tuple[Any, ...]:
    """Weights and masters after an edit, and after more steps; written in stage 0 into the parameters themselves."""
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(stage, transport, precision))
    take_step(engine, 0)
    edited = _edited(model)
    if not gathers:
        _edit(edited)
    else:
        with GatheredParameters(edited, modifier_rank=1):
            if engine.global_rank == 1:
                _edit(edited)
            else:
                with torch.no_grad():
                    edited[0].fill_(77.0)  # not the modifier: dropped
    assert inside.gathered_bytes(engine) == 0
    now = engine.module_state_dict()
    with GatheredParameters(model.parameters()):
        assert_same_weights({name: p.detach() for name, p in model.state_dict().items()}, now, "gathered")
    for unit in inside.units(engine):
        unit.adopt_written_parameters()  # the next step would
    kept = masters(engine)
    for step in (1, 2):
        take_step(engine, step)
    return now, kept, engine.module_state_dict(), masters(engine)


@in_every_stage
def test_an_edit_reaches_all_ranks_and_the_masters(ranks, stage, path):
    """S3: parameters, fp32 masters and the next steps are those of stage 0 with the same edit."""
    for precision in ("fp32", "bf16", "split"):
        pool = ranks(2)
        expected = pool.run(_trained_after_an_edit, 0, path, precision, False)
        actual = pool.run(_trained_after_an_edit, stage, path, precision, True)
        for i in (0, 2):
            for weights, others in zip(actual, expected, strict=True):
                assert_same_weights(weights[i], others[i], f"{precision} {i}")
        for i in (1, 3):
            assert_same_weights(
                merged([r[i] for r in actual]), merged([r[i] for r in expected]), f"masters, {precision} {i}"
            )


def _refused_edits(stage: int, transport: str, precision: str) -> None:
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(stage, transport, precision))
    take_step(engine, 0)
    before, kept = engine.module_state_dict(), masters(engine)
    edited, rank = _edited(model), engine.global_rank
    claimed = {"nobody": None, "another parameter": 0}
    for what, modifier in claimed.items():
        for writers in ((0,), (1,), (0, 1)):
            holds = GatheredParameters([*edited[1:], model.body.blocks[0].mix.weight], modifier_rank=modifier)
            with pytest.raises(RuntimeError, match="written to inside GatheredParameters on rank") as caught, holds:
                old = edited[0].detach().clone() if stage < 3 else None
                with torch.no_grad():
                    target = edited[1] if modifier is None else model.body.blocks[0].mix.bias
                    old = target.detach().clone()
                    if rank in writers:
                        target.mul_(2)
            assert f"rank {', '.join(map(str, writers))}," in str(caught.value), what
            if rank in writers:
                assert ("blocks.1.mix.weight" if modifier is None else "blocks.0.mix.bias") in str(caught.value)
            if stage < 3 and rank in writers:
                with torch.no_grad():
                    target.copy_(old)  # there the parameter is what was written to
    with pytest.raises(OSError, match="inside"), GatheredParameters(edited, modifier_rank=0), torch.no_grad():
        if stage == 3:
            edited[0].fill_(3.0)
        raise OSError("inside")
    with GatheredParameters(edited[0], enabled=False):
        if stage == 3:
            assert "embed" in error_of(edited[0].sum, AbsentParameterError)
    assert "ranks 0 to 1" in error_of(lambda: GatheredParameters(edited, modifier_rank=2), ValueError)
    assert inside.gathered_bytes(engine) == 0
    assert_same_weights(engine.module_state_dict(), before)
    assert_same_weights(
        {n: v.nan_to_num(7.0) for n, v in masters(engine).items()}, {n: v.nan_to_num(7.0) for n, v in kept.items()}
    )
    with GatheredParameters(edited, modifier_rank=0), GatheredParameters(edited[0]):  # nested
        assert torch.equal(edited[0].detach(), before["body.embed.weight"])
    take_step(engine, 1)


@in_every_stage
def test_an_edit_that_nobody_answers_for_is_refused_on_all_ranks(ranks, stage, path):
    """S3: without a modifier, or beside the claimed parameters; partitioned parameters are what they were."""
    for precision in ("fp32", "split"):
        ranks(2).run(_refused_edits, stage, path, precision)


def _assigned(transport: str) -> dict[str, Tensor]:
    """`.data =` inside."""
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(3, transport))
    weight = model.body.blocks[1].mix.weight
    with GatheredParameters(weight, modifier_rank=0):
        weight.data = torch.full_like(weight, 0.3 + engine.global_rank)
    with GatheredParameters([weight]):
        assert torch.equal(weight.detach(), torch.full_like(weight, 0.3))
    take_step(engine, 0)
    return engine.module_state_dict()


@through_both
def test_assigned_data_is_taken_over(ranks, path):
    """S3: the next step goes from it."""
    results = ranks(2).run(_assigned, path)
    assert_same_weights(results[0], results[1])
    assert 0.2 < results[0]["body.blocks.1.mix.weight"].mean() < 0.4


def _unequal(transport: str, held: bool, first: bool) -> dict[str, Tensor]:
    """Ranks run the model 0 and 4 times, and 3 and 1 times, in different ways."""
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(3, transport))
    rank = engine.global_rank
    if not first:
        take_step(engine, 0)
    for times in ((0, 4), (3, 1)):
        with GatheredParameters(model.parameters(), enabled=held), torch.no_grad():
            for i in range(times[rank]):
                tokens = batch_of(50 + i, rank)[0]
                whole = model(tokens)
                model.body.order = [2, 0] if i % 2 else [0, 1, 2, 3]
                model.body(tokens)
                model.body.order = [0, 1, 2, 3]
                assert torch.equal(model(tokens), whole)
            if held:
                assert model.head.weight.sum() != 0
                assert inside.gathered_bytes(engine) > 0
        assert inside.gathered_bytes(engine) == 0
        take_step(engine, 1)
    return engine.module_state_dict()


@pytest.mark.parametrize("first", [True, False], ids=["before the first step", "later"])
@pytest.mark.parametrize(
    ("path", "held"), [("shared_memory", False), ("shared_memory", True), ("torch", True)], ids=str
)
def test_ranks_generate_different_lengths(ranks, path, held, first):
    """S5: where memory is shared, always; elsewhere inside GatheredParameters. Training is that of stage 0."""
    results = ranks(2).run(_unequal, path, held, first)
    for weights, others in zip(results, ranks(2).run(_trained_without, path, first), strict=True):
        assert_same_weights(weights, others)


def _trained_without(transport: str, first: bool) -> dict[str, Tensor]:
    engine = partita.Engine(model=make_blocks(), config=config_for(0, transport))
    for step in (1, 1) if first else (0, 1, 1):
        take_step(engine, step)
    return engine.module_state_dict()


def _trains_inside(stage: int, transport: str) -> dict[str, Tensor]:
    """Forward and backward while parameters are held, some or all."""
    model = make_blocks()
    engine = partita.Engine(model=model, config=config_for(stage, transport))
    for step in range(4):
        held = _edited(model)[1:2] if step % 2 else model.parameters()
        with GatheredParameters(held):
            loss = engine(*batch_of(step, engine.global_rank))
            if step < 2:
                engine.backward(loss)
        if step >= 2:
            engine.backward(loss)
        engine.step()
        assert inside.gathered_bytes(engine) == 0
    return engine.module_state_dict()


@through_both
def test_forward_and_backward_inside_are_those_outside(ranks, path):
    """S2: also when the block ends between them."""
    expected = ranks(2).run(_trains_inside, 0, path)
    for weights, others in zip(ranks(2).run(_trains_inside, 3, path), expected, strict=True):
        assert_same_weights(weights, others)


def test_parameters_that_nobody_has_taken_are_left_alone():
    """Also beside taken ones: no process group is needed."""
    parameter = nn.Parameter(torch.ones(3))
    with GatheredParameters([parameter], modifier_rank=5), torch.no_grad():
        parameter.mul_(2)
    assert parameter.tolist() == [2, 2, 2]
