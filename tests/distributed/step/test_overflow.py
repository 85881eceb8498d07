"""Steps whose gradients are not finite: every rank skips them, nothing moves, and a run of them ends with a name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import PRECISIONS, SHAPES, SPLIT, Dictated, config_for, dictate, masters, share, take_step
from support import is_partitioned, whole
from torch import Tensor

STAGES = (0, 1, 2, 3)
BAD_VALUES = (float("inf"), float("-inf"), float("nan"))
OPTIMIZERS = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},  # a torch optimizer over the shards
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_min_lr": 0.001, "warmup_type": "linear"}}


def _snapshot(engine: partita.Engine) -> dict[str, Tensor]:
    """Every byte that a step may change: parameters, masters, moments (padding too)."""
    with whole(engine):
        tensors = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for i, unit in enumerate(inside.units(engine)):
        params = unit.own_params if is_partitioned(engine) else unit.params
        kept = {f"params {i}": params, f"master {i}": unit.master, f"remainder {i}": unit.remainder}
        tensors |= {name: tensor for name, tensor in kept.items() if tensor is not None}
    for i, moments in enumerate(inside.moments(engine)):
        tensors |= {f"{kind} {i}": tensor for kind, tensor in moments.items()}
    for i, state in enumerate(inside.torch_states(engine)):
        tensors |= {f"{key} {i}": torch.as_tensor(value) for key, value in state.items()}
    return {name: t.detach().reshape(-1).view(torch.uint8).clone() for name, t in tensors.items()}


def _element_in_shard(engine: partita.Engine, shard: int) -> tuple[str, int]:
    """The last element of some unit that belongs to rank `shard`."""
    for unit in inside.units(engine):
        slices = unit.layout.slices(unit.layout.shard_range(shard))
        if slices:
            return slices[-1].slot.name, slices[-1].parameter_offset + slices[-1].numel - 1
    raise AssertionError(f"no unit has elements in the shard of rank {shard}")


def _poisoned(grads: dict[str, Tensor], name: str, index: int, value: float) -> dict[str, Tensor]:
    result = dict(grads)
    result[name] = result[name].clone()
    result[name].view(-1)[index] = value
    return result


def _poisoned_step(engine: partita.Engine, name: str, index: int, value: float, on_rank: int, step: int) -> None:
    """A step in which one element of one rank's gradients, of the first micro-batch only, is `value`."""
    grads = share(dictate(step), engine.global_rank, engine.world_size)
    for micro_batch in range(engine.gradient_accumulation_steps()):
        bad = micro_batch == 0 and engine.global_rank == on_rank
        engine.backward(engine(_poisoned(grads, name, index, value) if bad else grads))
        engine.step()


def _skips_bad_steps(config: dict[str, Any]) -> None:
    engine = partita.Engine(model=Dictated(), config=config)
    clean = partita.Engine(model=Dictated(), config=config)
    take_step(engine, dictate(0))
    take_step(clean, dictate(0))
    skipped = 0
    for value in BAD_VALUES:
        for source in range(engine.world_size):
            for shard in range(engine.world_size):
                name, index = _element_in_shard(engine, shard)
                before, lr, scale = _snapshot(engine), engine.get_lr(), engine.loss_scale
                _poisoned_step(engine, name, index, value, source, step=100 + skipped)
                skipped += 1
                case = f"{value} of rank {source} in the shard of rank {shard}"
                for key, tensor in _snapshot(engine).items():
                    assert torch.equal(tensor, before[key]), f"{case}: {key} changed"
                assert engine.get_lr() == lr, case
                assert engine.lr_scheduler.last_epoch == 1, case
                assert (engine.skipped_steps, engine.global_steps) == (skipped, skipped + 1), case
                assert inside.loss_scale(engine).applied_steps == 1, case
                assert not torch.isfinite(torch.tensor(engine.get_global_grad_norm())), case
                assert engine.loss_scale == scale, case
    for step in (1, 2):
        take_step(engine, dictate(step))
        take_step(clean, dictate(step))
    assert engine.skipped_steps == skipped
    assert engine.get_lr() == clean.get_lr()
    ours, theirs = _snapshot(engine), _snapshot(clean)
    for key in theirs:
        if not key.startswith(("params", "master", "remainder")):  # whose padding is arbitrary
            assert torch.equal(ours[key], theirs[key]), f"{key} differs from a run without the skipped steps"
    for (name, ours), theirs in zip(masters(engine).items(), masters(clean).values(), strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), f"master of {name} differs"


@pytest.mark.parametrize(
    ("world_size", "stage", "precision"),
    [(2, stage, precision) for stage in STAGES for precision in PRECISIONS]
    + [(1, 1, "fp16"), (4, 0, "fp16"), (4, 2, "bf16"), (4, 3, "bf16")],
)
def test_one_bad_element_skips_the_step_on_every_rank(ranks, world_size, stage, precision):
    """N1: inf, -inf and NaN made by each rank, in the shard of each rank."""
    ranks(world_size).run(
        _skips_bad_steps, config_for(stage, precision, optimizer=OPTIMIZERS["AdamW"], scheduler=WARMUP)
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_clipping": 0.5},
        {"optimizer": OPTIMIZERS["SGD"]},
        {"optimizer": OPTIMIZERS["SGD"], "bf16": {"enabled": True}},
        {"communication_data_type": "fp32", "bf16": {"enabled": True}},
        {"gradient_clipping": 0.5, **SPLIT},
    ],
    ids=["accumulation", "clipping", "torch optimizer", "torch optimizer on bf16", "communication dtype", "split"],
)
def test_bad_steps_are_skipped_whatever_else_is_configured(ranks, stage, changes):
    """N1: the bad micro-batch is the first of three; clipping; an optimizer that is not native."""
    config = config_for(stage, **{"optimizer": OPTIMIZERS["AdamW"], "scheduler": WARMUP, **changes})
    ranks(2).run(_skips_bad_steps, config)


@contextmanager
def _log() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("partita")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def _runs_into_the_limit(config: dict[str, Any], bad: dict[int, tuple[str, int]]) -> tuple[list[str], str, int]:
    """Log lines about skipped steps, the error's text and the number of skips; then trains on.

    `bad`: by rank, the parameter whose gradient is not finite, and its element.
    """
    engine = partita.Engine(model=Dictated(), config=config)
    message = ""
    with _log() as records:
        for step in range(20):
            grads = share(dictate(step), engine.global_rank, engine.world_size)
            if engine.global_rank in bad:
                grads = _poisoned(grads, *bad[engine.global_rank], float("nan"))
            try:
                engine.backward(engine(grads))
                engine.step()
            except FloatingPointError as error:
                message = str(error)
                break
    skipped = engine.skipped_steps
    clean = partita.Engine(model=Dictated(), config=config)
    take_step(engine, dictate(5))
    take_step(clean, dictate(5))
    with whole(engine), whole(clean):
        for name, parameter in clean.module.named_parameters():
            assert torch.equal(parameter, dict(engine.module.named_parameters())[name]), f"{name} after the error"
    lines = [r.getMessage() for r in records if "skipped:" in r.getMessage()]
    assert all(r.levelno >= logging.WARNING for r in records if "skipped:" in r.getMessage())
    return lines, message, skipped


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_skipped_steps_is_counted_shown_and_ends_with_a_name(ranks, stage, precision):
    """N2: rank 1 makes NaN in parameter 'c' in every step; training may go on after the error."""
    config = config_for(stage, precision, optimizer=OPTIMIZERS["AdamW"], max_consecutive_skipped_steps=3)
    results = ranks(2).run(_runs_into_the_limit, config, {1: ("c", 32)})
    for rank, (lines, message, skipped) in enumerate(results):
        assert skipped == 3
        assert "step 3" in message
        assert "3 steps in a row" in message
        assert "rank 1, first in parameter 'c'" in message
        assert "rank 0" not in message
        assert len(lines) == (3 if rank == 0 else 0), lines
    for step, line in enumerate(results[0][0], start=1):
        assert f"step {step} " in line
        assert f"skipped so far: {step}" in line


@pytest.mark.parametrize("limit", [1, 2])
def test_every_guilty_rank_is_named(ranks, limit):
    """N2: ranks 0 and 2 of 3; already the first skipped step can be the last."""
    config = config_for(2, optimizer=OPTIMIZERS["AdamW"], max_consecutive_skipped_steps=limit)
    for _, message, skipped in ranks(3).run(_runs_into_the_limit, config, {0: ("a", 0), 2: ("e", SHAPES["e"][0] - 1)}):
        assert skipped == limit
        assert "rank 0, first in parameter 'a'" in message
        assert "rank 1" not in message
        assert "rank 2, first in parameter 'e'" in message


def _overflows_in_the_sum(config: dict[str, Any]) -> str:
    engine = partita.Engine(model=Dictated(), config=config)
    try:
        engine.backward(engine({"e": torch.full(SHAPES["e"], 40000.0)}))  # finite in float16, twice that is not
        engine.step()
    except FloatingPointError as error:
        return str(error)
    return ""


def test_a_sum_that_overflows_blames_no_rank(ranks):
    """N2: every rank's own gradients are finite; only their sum in float16 is not."""
    fp16 = {"enabled": True, "loss_scale": 1.0}
    config = config_for(1, optimizer=OPTIMIZERS["AdamW"], fp16=fp16, max_consecutive_skipped_steps=1)
    for message in ranks(2).run(_overflows_in_the_sum, config):
        assert "every rank's own gradients are finite" in message


def _alternates(config: dict[str, Any]) -> int:
    engine = partita.Engine(model=Dictated(), config=config)
    for step in range(8):
        if step % 2:
            take_step(engine, dictate(step))
        else:
            _poisoned_step(engine, "e", 0, float("inf"), on_rank=0, step=step)
    return engine.skipped_steps


def test_only_skips_in_a_row_end_a_run(ranks):
    """N2: a good step in between starts the count anew."""
    config = config_for(1, "bf16", optimizer=OPTIMIZERS["AdamW"], max_consecutive_skipped_steps=2)
    assert ranks(2).run(_alternates, config) == [4, 4]
