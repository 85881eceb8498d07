"""Gradients that a program writes by hand count in the step, as this rank's part of the mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import partita
import pytest
import torch
from pairwise import pairwise
from partita.utils import safe_get_full_grad, safe_set_full_grad
from small_models import assert_same_weights, config, inputs, seeded, weights
from torch import Tensor

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
}


def _written(parameter: Tensor, step: int, rank: int) -> Tensor:
    """Multiples of 1/8, so that 16-bit types have them."""
    generator = torch.Generator().manual_seed(step + 10 * rank)
    return (torch.randint(-8, 9, parameter.shape, generator=generator) / 8).to(parameter.dtype)


def all_of_them(model: Any, backward: Callable[[int], None], step: int, rank: int) -> None:
    """There is no backward at all."""
    for parameter in model.parameters():
        parameter.grad = _written(parameter, step, rank)


def one_instead(model: Any, backward: Callable[[int], None], step: int, rank: int) -> None:
    """After a backward one gradient takes the place of autograd's."""
    backward(step)
    model.second.weight.grad = _written(model.second.weight, step, rank)


def one_before(model: Any, backward: Callable[[int], None], step: int, rank: int) -> None:
    """Autograd adds to what is there."""
    model.first.weight.grad = _written(model.first.weight, step, rank)
    backward(step)


def one_between(model: Any, backward: Callable[[int], None], step: int, rank: int) -> None:
    """Autograd adds to what took the place of the first backward's."""
    backward(step)
    model.second.bias.grad = _written(model.second.bias, step, rank)
    model.first.bias.grad = None
    backward(step + 5)


SCRIPTS = [all_of_them, one_instead, one_before, one_between]


def _compare(cases: list[tuple[Any, ...]]) -> None:
    world_size = torch.distributed.get_world_size()
    for script, stage, precision, accumulation in cases:
        # A parameter of stage 3 takes a gradient as any other: that needs no values.
        zero = {"stage": stage, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
        settings = config(
            zero_optimization=zero,
            optimizer={"type": "SGD", "params": {"lr": 0.1}},
            gradient_accumulation_steps=accumulation,
            **PRECISIONS[precision],
        )
        engine = partita.Engine(seeded(), config=settings)
        for step in range(3):
            for _ in range(accumulation):
                script(engine.module, partial(_backward, engine), step, engine.global_rank)
                engine.step()
        found = engine.module_state_dict()
        norm = engine.get_global_grad_norm()
        engine.destroy()
        expected, expected_norm = _plain(script, world_size)
        tolerance = 1e-6 if precision == "fp32" else 2e-2
        where = f"{script.__name__}, stage {stage}, {precision}, {accumulation} micro-batches"
        try:
            assert_same_weights({n: v.float() for n, v in found.items()}, expected, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        assert norm == pytest.approx(expected_norm, rel=1e-5 if precision == "fp32" else 3e-2), where


def _backward(engine: partita.Engine, step: int) -> None:
    engine.backward(engine(inputs(step + 50 * engine.global_rank)))


def _plain(script: Any, world_size: int) -> tuple[dict[str, Tensor], float]:
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norm = 0.0
    for step in range(3):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(world_size):
            model.zero_grad()
            script(model, lambda s, r=rank: model(inputs(s + 50 * r)).backward(), step, rank)
            for total, parameter in zip(sums, model.parameters(), strict=True):
                if parameter.grad is not None:
                    total += parameter.grad / world_size
        for total, parameter in zip(sums, model.parameters(), strict=True):
            parameter.grad = total
        norm = float(torch.cat([total.flatten() for total in sums]).norm())
        optimizer.step()
    return weights(model), norm


def _cases() -> list[tuple[Any, ...]]:
    cases = pairwise(product(SCRIPTS, STAGES, PRECISIONS, (1, 2)))
    # What replaces a gradient of a later micro-batch is refused, see below.
    return [case for case in cases if case[0] in (all_of_them, one_before) or case[3] == 1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_written_gradients_count(ranks, world_size):
    """The mean over ranks and micro-batches of what each wrote; the loss scale is not the program's concern."""
    ranks(world_size).run(_compare, _cases())


def test_replacing_what_cannot_be_told_apart_is_refused():
    """The gradient of the micro-batch at hand is in the sum of the step."""
    engine = partita.Engine(seeded(), config=config(gradient_accumulation_steps=2))
    engine.backward(engine(inputs()))
    engine.step()
    engine.backward(engine(inputs()))
    engine.module.first.weight.grad = torch.zeros(5, 4)
    with pytest.raises(RuntimeError, match=r"'first\.weight'.*engine\.zero_grad\(\)"):
        engine.step()


def _set_full(stage: int) -> tuple[Tensor, Tensor]:
    zero = {"stage": stage, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
    engine = partita.Engine(
        seeded(), config=config(zero_optimization=zero, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    )
    parameter = engine.module.first.weight
    before = engine.module_state_dict()["first.weight"]
    parameter.grad = torch.full((5, 4), float(engine.global_rank))
    seen = safe_get_full_grad(parameter)
    engine.backward(engine(inputs()))
    safe_set_full_grad(parameter, torch.full((5, 4), 0.25))
    engine.step()
    return seen, before - engine.module_state_dict()["first.weight"]


@pytest.mark.parametrize("stage", STAGES)
def test_whole_gradients_are_read_and_set(ranks, stage):
    """Also what was written by hand, and in stage 3."""
    for seen, moved in ranks(2).run(_set_full, stage):
        assert torch.equal(seen, torch.full((5, 4), 0.5))
        torch.testing.assert_close(moved, torch.full((5, 4), 0.25))
