"""Buffers that change in training: every rank evaluates and saves rank 0's, as under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from communicators import RecordingCommunicator, communicating_through
from safetensors.torch import load_file
from small_models import Regression, config, inputs, seeded
from torch import Tensor, nn


class WithStatistics(Regression):
    """BatchNorm, a codebook that the forward writes through `.data`, and a cache of another size on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("codes", torch.zeros(3, 4))
        self.register_buffer("constant", torch.linspace(0, 1, 7))
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.data.lerp_(x[:3], 0.1)
            self.cache = torch.zeros(2 + int(x[0, 0] > 0))
        return self.second(self.norm(torch.tanh(self.first(x)))).pow(2).mean()


def _settings(stage: int, **changes: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return config(optimizer={"type": "SGD", "params": {"lr": 0.1}}, zero_optimization=zero, **changes)


def _train(engine: partita.Engine, steps: int) -> None:
    for step in range(steps):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(inputs(10 * step + micro + 100 * engine.global_rank)))
            engine.step()


def _buffers(engine: partita.Engine) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in engine.module.named_buffers() if name != "cache"}


def _run(stage: int, accumulation: int, path: Path) -> tuple[dict[str, Tensor], Tensor, Any]:
    engine = partita.Engine(seeded(WithStatistics), config=_settings(stage, gradient_accumulation_steps=accumulation))
    _train(engine, 5)
    evaluated = engine.eval_batch(inputs(999))
    found = _buffers(engine)
    with torch.no_grad():  # a recalibration of the statistics, without an update
        engine(inputs(77 + engine.global_rank))
    engine.save_model(path)
    snapshot = engine.train_state().copy()
    assert torch.equal(snapshot.tensors["codes"], _buffers(engine)["codes"])
    saved = load_file(path)
    assert torch.equal(saved["norm.running_mean"], snapshot.tensors["norm.running_mean"])
    engine(inputs(78 + engine.global_rank))
    engine.sync_buffers()
    recalibrated = _buffers(engine)
    engine.destroy()
    return found, evaluated, (snapshot.tensors, recalibrated)


def _as_rank_0(accumulation: int) -> dict[str, Tensor]:
    """Rank 0's statistics never see another rank's data, only other weights."""
    engine = partita.Engine(seeded(WithStatistics), config=_settings(0, gradient_accumulation_steps=accumulation))
    _train(engine, 5)
    return _buffers(engine)


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_every_rank_has_the_buffers_of_rank_0(ranks, tmp_path, stage, accumulation):
    """F17. After each step, in what is saved, and when asked."""
    (found, evaluated, others), (found_1, evaluated_1, others_1) = ranks(2).run(
        _run, stage, accumulation, tmp_path / "model.safetensors"
    )
    assert torch.equal(evaluated, evaluated_1)
    for mine, theirs in ((found, found_1), (others[0], others_1[0]), (others[1], others_1[1])):
        assert [n for n in mine if n != "cache" and not torch.equal(mine[n], theirs[n])] == []
    assert found["norm.num_batches_tracked"] == 5 * accumulation
    alone = _as_rank_0(accumulation)
    assert torch.equal(found["codes"], alone["codes"])  # the codes depend on data alone


def _kept_apart() -> Tensor:
    engine = partita.Engine(seeded(WithStatistics), config=_settings(1, sync_buffers=False))
    _train(engine, 3)
    return _buffers(engine)["codes"]


def test_each_rank_may_keep_its_own(ranks):
    """F17. `sync_buffers: false`."""
    first, second = ranks(2).run(_kept_apart)
    assert not torch.equal(first, second)


def _broadcasts(changing: bool) -> list[int]:
    with communicating_through(RecordingCommunicator) as recorder:
        engine = partita.Engine(seeded(WithStatistics if changing else OnlyConstants), config=_settings(0))
        counts = []
        for step in range(5):
            recorder.events.clear()
            engine.backward(engine(inputs(step + 100 * engine.global_rank)))
            engine.step()
            counts.append(sum("broadcast" in str(event) for event in recorder.launches()))
        engine.destroy()
    return counts


class OnlyConstants(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.linspace(0, 1, 7))


def test_buffers_that_never_differ_cost_nothing(ranks):
    """F17. All are compared in the updates 1, 2 and 4; in others those that have differed are sent, one message each
    dtype."""
    assert ranks(2).run(_broadcasts, False) == [[1, 1, 0, 1, 0]] * 2
    assert ranks(2).run(_broadcasts, True) == [[2, 2, 1, 2, 1]] * 2
