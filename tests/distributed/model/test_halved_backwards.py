"""Backwards in two halves over real reducers: two parts, interleaved micro-batches, the bits of joint backwards."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from pairwise import pairwise
from partita.pipeline.weight_split import Deferred, WeightSplit
from parts import Halves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MICRO_BATCHES = 3
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {
        "bf16": {"enabled": True, "master_weights": "split"},
        "prescale_gradients": True,
        "gradient_predivide_factor": 3.0,
    },
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}},
}
# Of a part and micro-batch. Weight gradients wait over other micro-batches and parts.
ORDERS = {
    "at once": "F00 F10 I10 W10 I00 W00 F01 F11 I11 W11 I01 W01 F02 F12 I12 W12 I02 W02",
    "late": "F00 F01 F02 F10 F11 F12 I10 I00 I11 I01 W10 I12 W11 W00 I02 W12 W01 W02",
    "some joint": "F00 F10 I10 B00 F01 F11 W10 B11 I01 F02 F12 I12 W01 I02 W12 W02",
}


class Bottom(nn.Module):
    """Tokens to features: all kinds of layers that wait, one use of a layer in each of two checkpoints."""

    def __init__(self, checkpoints: str) -> None:
        super().__init__()
        self.bottom_table = nn.Embedding(31, 24)
        self.bottom_mix = nn.Conv1d(24, 24, 3, padding=1)
        self.bottom_norm = nn.LayerNorm(24)
        self.bottom_twice = nn.Linear(24, 24)
        self.checkpoints = checkpoints

    def body(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.bottom_twice(self.bottom_norm(h)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bottom_table(x)
        h = self.bottom_mix(h.transpose(1, 2)).transpose(1, 2)
        for _ in range(2):
            if self.checkpoints == "none":
                h = self.body(h)
            else:
                h = checkpoint(self.body, h, use_reentrant=self.checkpoints == "reentrant")
        return h


class Top(nn.Module):
    """Features to logits; nothing here has a gradient in I."""

    def __init__(self) -> None:
        super().__init__()
        self.top_first = nn.Linear(24, 61)
        self.top_head = nn.Linear(61, 31, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.top_head(torch.relu_(self.top_first(h)))  # type: ignore[no-any-return]


def make(checkpoints: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Bottom(checkpoints), Top())


def config_for(stage: int, precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 700},
        "steps_per_print": 0,
        **PRECISIONS[precision],
    }


class Trained:
    """The two parts, and the gradients that wait."""

    def __init__(self, config: dict[str, Any], checkpoints: str, exits: ExitStack) -> None:
        self.halves = Halves(make(checkpoints), config)
        exits.callback(self.halves.close)
        self.splits = [WeightSplit(part.module, exits) for part in self.halves.parts]
        self.forget()

    def forget(self) -> None:
        """A step is over."""
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.waiting: dict[tuple[int, int], Deferred] = {}

    def act(self, kind: str, part: int, micro: int, tokens: Tensor, bad: bool) -> None:
        """One action of a schedule."""
        if kind == "F":
            x = tokens if part == 0 else self.outputs[0, micro].detach().requires_grad_()
            self.inputs[part, micro] = x
            self.outputs[part, micro] = self.halves.parts[part].forward(x)
        elif kind == "B":
            self.backward(part, micro, bad)
        elif kind == "I":
            with self.splits[part].collecting() as self.waiting[part, micro]:
                self.backward(part, micro, bad)
        else:
            self.add(part, micro)
        if kind in "BI":
            self.halves.end(self.halves.parts[part])

    def backward(self, part: int, micro: int, bad: bool) -> None:
        """Of which nothing is reduced."""
        module, out = self.halves.parts[part], self.outputs.pop((part, micro))
        with module.accumulation.no_sync():
            if part == 1:
                loss = out.float().square().mean() * (float("inf") if bad else 1.0)
                module.backward([self.halves.scaling.scale(loss)])
            else:
                module.backward([out], [self.inputs[1, micro].grad])  # type: ignore[list-item]

    def add(self, part: int, micro: int) -> None:
        """W."""
        deferred = self.waiting.pop((part, micro))
        assert deferred.nbytes > 0
        for parameter, gradient in deferred.gradients():
            self.halves.parts[part].reducer.add(parameter, gradient)


def _train(
    config: dict[str, Any], order: str, checkpoints: str, bad: int | None, joins: bool
) -> list[dict[str, Tensor]]:
    """After each of three steps: the summed gradients of this rank before the update, and the weights."""
    found = []
    with ExitStack() as exits:
        trained = Trained(config, checkpoints, exits)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for step in range(3):
            for kind, part, micro in order.split() if not joins else joined(order):
                seed = torch.Generator().manual_seed(100 * step + 10 * int(micro) + rank)
                tokens = torch.randint(31, (2, 7), generator=seed)
                trained.act(kind, int(part), int(micro), tokens, step == bad and rank == ranks - 1)
            units = [unit for part in trained.halves.parts for unit in part.units]
            sums = {f"sum {i}": unit.full_grads.clone() for i, unit in enumerate(units)}  # type: ignore[union-attr]
            trained.halves.step.update()
            found.append(sums | trained.halves.weights())
            trained.forget()
    return found


def joined(order: str) -> list[str]:
    """The same order with joint backwards in the place of I, and no W."""
    return [action.replace("I", "B") for action in order.split() if action[0] != "W"]


CASES = list(product((0, 1), PRECISIONS, ORDERS, ("none", "reentrant", "not reentrant")))


def _assert_as_joint(ranks: Any, stage: int, precision: str, order: str, checkpoints: str) -> None:
    config, bad = config_for(stage, precision), 1 if precision == "fp16" else None
    joint = ranks(2).run(_train, config, ORDERS[order], checkpoints, bad, True)
    halves = ranks(2).run(_train, config, ORDERS[order], checkpoints, bad, False)
    for ours, theirs in zip(halves, joint, strict=True):
        for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
            assert mine.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(mine[name].nan_to_num(7), value.nan_to_num(7)), (step, name)


@pytest.mark.parametrize(("stage", "precision", "order", "checkpoints"), pairwise(CASES))
def test_halves_train_as_joint_backwards(ranks, stage, precision, order, checkpoints):
    """Bit for bit on 2 ranks, the summed gradients too; with a skipped step in fp16."""
    _assert_as_joint(ranks, stage, precision, order, checkpoints)


@pytest.mark.slow
def test_halves_train_as_joint_backwards_in_every_case(ranks):
    for case in CASES:
        _assert_as_joint(ranks, *case)


def _refusals(stage: int) -> list[str]:
    """What the reducer says when a gradient comes at a wrong time, or is none of its own."""
    said = []
    with ExitStack() as exits:
        trained = Trained(config_for(stage, "fp32"), "none", exits)
        part = trained.halves.parts[1]
        weight = part.module.top_head.weight

        def give(parameter: nn.Parameter, gradient: Tensor) -> None:
            try:
                part.reducer.add(parameter, gradient)
            except (RuntimeError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
            else:
                said.append("taken")

        give(weight, torch.ones_like(weight))
        x = torch.randn(2, 7, 24)
        h = part.forward(x)
        h.register_hook(lambda _: part.reducer.accumulated(0, part.units[0].parameters[0]))
        with part.accumulation.no_sync() if stage < 2 else ExitStack():
            out = h.sum()
            h.register_hook(lambda _: give(weight, torch.ones_like(weight)))
            part.backward([out])
        give(weight, torch.ones_like(weight))
        give(weight, torch.ones(31))
        give(nn.Parameter(torch.ones(3)), torch.ones(3))
        part.reducer.reduce_all()
        give(weight, torch.ones_like(weight))
    return said


def test_a_gradient_at_a_wrong_time_is_refused(ranks):
    before, during, taken, shape, foreign, after = ranks(1).run(_refusals, 1)[0]
    assert before.startswith("RuntimeError") and "'top_head.weight'" in before and "holds nothing" in before
    assert during.startswith("RuntimeError") and "another backward is under way" in during
    assert taken == "taken"
    assert shape.startswith("ValueError") and "'top_head.weight' of shape (31, 61)" in shape and "(31,)" in shape
    assert foreign.startswith("ValueError") and "another model" in foreign
    assert after.startswith("RuntimeError") and "holds the sum over ranks" in after
    assert "stage 2 keeps no sum on this rank" in ranks(1).run(_refusals, 2)[0][0]


def _finiteness() -> list[tuple[str, bool]]:
    with ExitStack() as exits:
        trained = Trained(config_for(0, "fp32"), "none", exits)
        for part in trained.halves.parts:
            part.reducer.packing.watches_finiteness = True
        for action in ("F00", "F10", "I10", "W10"):
            trained.act(action[0], int(action[1]), 0, torch.zeros(2, 7, dtype=torch.int64), bad=True)
        seen = trained.halves.parts[1].reducer.packing.take_finiteness()
        return [(name, bool(finite)) for name, finite in seen]


def test_gradients_that_waited_are_watched_too(ranks):
    names = ("top_head.weight", "top_first.weight", "top_first.bias")
    assert ranks(1).run(_finiteness)[0] == [(name, False) for name in names]
