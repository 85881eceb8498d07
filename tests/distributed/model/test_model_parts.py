"""Two parts of a model in one process: their backwards are interleaved, and one optimizer step updates both."""

from __future__ import annotations

from itertools import product
from typing import Any

import partita
import pytest
import torch
from pairwise import pairwise
from parts import Halves
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = 2
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},
}
# F and B of a part and micro-batch. In the second, a part has several forwards before its first backward, and the
# backward of one part comes between two of the other.
ORDERS = {
    "one after the other": ["F00", "F10", "B10", "B00", "F01", "F11", "B11", "B01"],
    "interleaved": ["F00", "F01", "F10", "B10", "F11", "B00", "B11", "B01"],
    "all forwards first": ["F00", "F01", "F10", "F11", "B10", "B11", "B00", "B01"],
}


class Half(nn.Module):
    """Names that no other half has, and parameters that lie on both ranks where shards are whole pages."""

    def __init__(self, name: str, width_in: int, width_out: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(f"{name}_first", nn.Linear(width_in, 97))
        self.add_module(f"{name}_second", nn.Linear(97, width_out))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.children()
        return second(torch.tanh(first(x)))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Half("a", 5, 45), Half("b", 45, 3))


def config_for(stage: int, precision: str, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 60, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 0,
        **PRECISIONS[precision],
        **changes,
    }


def batch_of(step: int, micro: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(4, 5, generator=generator).to(dtype)


def loss_of(outputs: Tensor, bad: bool) -> Tensor:
    loss = outputs.float().square().mean()
    return loss * float("inf") if bad else loss


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    return torch.float16 if "fp16" in config else torch.bfloat16 if "bf16" in config else torch.float32


def _whole(config: dict[str, Any], steps: int, bad: int | None) -> dict[str, Tensor]:
    """The model in one engine. In step `bad`, the last rank's gradients are not finite."""
    engine = partita.Engine(make(), config=config)
    last = engine.global_rank == engine.world_size - 1
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            outputs = engine(batch_of(step, micro, engine.global_rank, dtype_of(config)))
            engine.backward(loss_of(outputs, step == bad and last))
            engine.step()
    weights = engine.module_state_dict()
    assert engine.skipped_steps == (bad is not None)
    engine.destroy()
    return weights


def _halves(config: dict[str, Any], steps: int, order: list[str], bad: int | None) -> dict[str, Tensor]:
    halves = Halves(make(), config)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(steps):
        inputs: dict[tuple[int, int], Tensor] = {}
        outputs: dict[tuple[int, int], Tensor] = {}
        for kind, part, micro in ((action[0], int(action[1]), int(action[2])) for action in order):
            module = halves.parts[part]
            if kind == "F":
                x = batch_of(step, micro, rank, dtype_of(config)) if part == 0 else outputs[0, micro].detach()
                inputs[part, micro] = x.requires_grad_(part == 1)
                outputs[part, micro] = module.forward(x)
            elif part == 1:
                loss = loss_of(outputs[1, micro], step == bad and rank == ranks - 1)
                module.backward([halves.scaling.scale(loss)])
                halves.end(module)
            else:
                grad = inputs[1, micro].grad
                assert grad is not None
                module.backward([outputs[0, micro]], [grad])
                halves.end(module)
        halves.step.update()
    weights = halves.weights()
    halves.close()
    return weights


CASES = list(product(STAGES, PRECISIONS, ORDERS))


def _assert_trained_as_one(ranks: Any, stage: int, precision: str, order: str) -> None:
    config = config_for(stage, precision)
    bad = 1 if precision == "fp16" else None
    expected = ranks(2).run(_whole, config, 4, bad)
    for ours, theirs in zip(ranks(2).run(_halves, config, 4, ORDERS[order], bad), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("stage", "precision", "order"), pairwise(CASES))
def test_two_parts_are_trained_as_one_model(ranks, stage, precision, order):
    """Bit for bit, on 2 ranks, with a skipped step of both parts where only one gradient overflows."""
    _assert_trained_as_one(ranks, stage, precision, order)


@pytest.mark.slow
def test_two_parts_are_trained_as_one_model_in_every_case(ranks):
    for case in CASES:
        _assert_trained_as_one(ranks, *case)


def _joined(config: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """One graph goes through both parts, and one plain backward ends in both."""
    halves = Halves(make(), config)
    first, second = halves.parts
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            x = batch_of(step, micro, torch.distributed.get_rank(), dtype_of(config))
            loss = loss_of(second.forward(first.forward(x)), bad=False)
            (halves.scaling.scale(loss) if micro else loss).backward()
            for part in halves.parts:
                halves.end(part)
        halves.step.update()
    weights = halves.weights()
    halves.close()
    return weights


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", (0, 2))
def test_one_backward_may_go_through_both_parts(ranks, stage, precision):
    """The loss scale counts once, whether the loss was scaled or not. In float16 the unscaled loss rounds otherwise."""
    config = config_for(stage, precision)
    expected = ranks(2).run(_whole, config, 3, None)[0]
    for ours in ranks(2).run(_joined, config, 3):
        for name, value in expected.items():
            if precision == "fp16":
                torch.testing.assert_close(ours[name], value, rtol=2e-2, atol=2e-3)
            else:
                assert torch.equal(ours[name], value), name


def _counted(config: dict[str, Any]) -> tuple[float, float, int]:
    """The norm over both parts, that of the same gradients in plain PyTorch, and the steps."""
    halves = Halves(make(), config)
    plain = make()
    for micro in range(MICRO_BATCHES):
        x = batch_of(0, micro, 0, torch.float32)
        first, second = halves.parts
        second.backward([loss_of(second.forward(first.forward(x)), bad=False)])
        (loss_of(plain(x), bad=False) / MICRO_BATCHES).backward()
        first.finish_backward()
        for part in halves.parts:
            halves.end(part)
    halves.step.update()
    norm = halves.step.grad_norm() or 0.0
    steps = halves.step.global_steps
    halves.close()
    return norm, nn.utils.clip_grad_norm_(plain.parameters(), 1e9).item(), steps


def test_the_norm_is_that_of_all_parts(ranks):
    norm, expected, steps = ranks(1).run(_counted, config_for(0, "fp32"))[0]
    assert norm == pytest.approx(expected, rel=1e-5)
    assert steps == 1
