"""Activation checkpointing: parameters whose gradients arrive several times in one backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import inside
import partita
import pytest
import torch
import torch.nn.functional as F
from communicators import RecordingCommunicator, communicating_through
from reference import (
    DTYPES,
    ODD_MODEL,
    PRECISIONS,
    Training,
    assert_equal_runs,
    backward_of,
    numbers,
    sgd_config,
    tokens_of,
    train_in_engine,
    train_plain,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STAGES = (0, 1, 2, 3)


class Checkpointed(nn.Module):
    """Tied embedding and head, a frozen layer and one used in two checkpoints; `reentrant` None: no checkpoints."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embed = nn.Embedding(11, 6)
        self.shared = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.own = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self._run(self._first, x)
        x = self._run(self._second, x)
        return F.cross_entropy(self._run(self.head, x).float().flatten(0, -2), targets.flatten())

    def _first(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(self.shared(x)))

    def _second(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.own(x))) + self.frozen(x)

    def _run(self, function: Any, x: Tensor) -> Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool | None) -> Training:
    return Training(partial(Checkpointed, reentrant), ODD_MODEL.micro_batch)


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_shared_and_frozen_parameters(ranks, stage, reentrant, backward):
    """G12. Gradients that arrive several times in one backward are reduced once, whole."""
    config = sgd_config(stage=stage, gradient_accumulation_steps=2, reduce_bucket_size=40)
    runs = ranks(2).run(train_in_engine, checkpointed(reentrant), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 4))


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reentrant_checkpointing_in_16_bits(ranks, precision, backward):
    """G12. The loss is scaled once though backward is entered again."""
    config = sgd_config(stage=1, **PRECISIONS[precision])
    runs = ranks(2).run(train_in_engine, checkpointed(True), config, None, backward)
    assert_equal_runs(runs, train_plain(checkpointed(None), 2, DTYPES[precision]), precision)


def _launches_of_a_backward(config: dict[str, Any], backward: str) -> tuple[list[int], int]:
    """Launches in each step's backward, and the number of units."""
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(model=Checkpointed(reentrant=True), config=config)
        launches = []
        for step in range(3):
            recorder.events.clear()
            backward_of(engine, backward)(engine(*tokens_of(step, 0)))
            launches.append(len(recorder.launches()))
            engine.step()
        units = len(inside.units(engine))
        engine.destroy()
    return launches, units


@pytest.mark.parametrize("backward", ["engine.backward", "loss.backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_end_of_a_reentrant_backward_is_not_the_end(ranks, stage, backward):
    """G12. Once that is known, each unit is reduced once in a backward, however often backward is entered again."""
    for launches, units in ranks(2).run(
        _launches_of_a_backward, sgd_config(stage=stage, reduce_bucket_size=40), backward
    ):
        assert units > 2
        assert launches[1:] == [units] * 2
        # The first one learns how often gradients arrive: ranks agree on which units came again, and reduce those.
        assert units < launches[0] <= 2 * units + 1


class Repeated(nn.Module):
    """A layer in as many reentrant checkpoints as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = torch.tanh(checkpoint(self.layer, x, use_reentrant=True))
        return x.square().mean()


def repeated_micro_batch(times: tuple[int, ...], forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, 5).requires_grad_(), times[step]))


def repeated(*times: int) -> Training:
    return Training(Repeated, partial(repeated_micro_batch, times), steps=len(times))


@pytest.mark.parametrize("stage", STAGES)
def test_fewer_reentrant_uses_than_before_are_right(ranks, stage):
    """G12. The number of uses is a maximum that was seen, not one that every backward must reach."""
    runs = ranks(2).run(train_in_engine, repeated(3, 1, 2, 0, 3), sgd_config(stage=stage, reduce_bucket_size=1))
    assert_equal_runs(runs, train_plain(repeated(3, 1, 2, 0, 3), 2))


def test_more_reentrant_uses_than_before_are_refused_by_name(ranks):
    """G12. The gradient is under way already; without overlap it is not."""
    config = sgd_config(stage=1, reduce_bucket_size=1, overlap_comm=False)
    assert_equal_runs(ranks(2).run(train_in_engine, repeated(1, 3), config), train_plain(repeated(1, 3), 2))
    config = sgd_config(stage=1, reduce_bucket_size=1)
    with pytest.raises(AssertionError, match=r"parameter 'layer\.(weight|bias)' received another gradient"):
        ranks(2).run(train_in_engine, repeated(1, 3), config)
