"""Measured times of layers: all of them, with the loss, and nothing is changed by it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec, measure_layers
from torch import Tensor, nn
from torch.nn import functional as F

PAUSE_S = 0.01


class SlowBackward(torch.autograd.Function):
    """Does nothing, and takes its time for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        return grads[0]


def slow(x: Tensor) -> Tensor:
    time.sleep(PAUSE_S)
    return x


def head(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return F.linear(x, module.weight)


def slow_loss(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(SlowBackward.apply(slow(x)), labels)  # type: ignore[no-untyped-call]


IDS = torch.tensor([0, 1, 2])


def test_each_layer_has_its_time_and_the_last_one_that_of_the_loss():
    """A sleep takes at least what it says."""
    tied = [TiedLayerSpec("word", nn.Embedding, 5, 4, forward_fn=f) for f in (None, head)]
    layers = [tied[0], slow, LayerSpec(nn.Linear, 4, 4), SlowBackward.apply, nn.ReLU(inplace=True), tied[1]]
    times = measure_layers(layers, IDS, IDS, loss_fn=slow_loss, repeats=3)
    assert len(times.forward_ms) == len(times.backward_ms) == len(layers)
    assert min(times.forward_ms[1], times.forward_ms[5], times.backward_ms[3], times.backward_ms[5]) >= 1e3 * PAUSE_S
    assert times.costs == [f + b for f, b in zip(times.forward_ms, times.backward_ms, strict=True)]
    assert min(times.costs) > 0
    module = PipelineModule(layers, num_stages=1, partition_method="cost", layer_costs=times.costs)
    module.build([0, 0])


def test_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.ones(3, 4)
    state = torch.get_rng_state()
    with torch.no_grad():
        measure_layers(model, inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not inputs.requires_grad


def test_layers_get_what_they_skip_from_and_what_is_no_tensor():
    seen = []

    def first(x: Tensor) -> dict[str, Any]:
        return {"pair": (x, [x + 1]), "n": 3}

    def last(given: dict[str, Any], skipped: dict[str, Any]) -> Tensor:
        seen.append((given["n"], skipped["n"]))
        return given["pair"][0] + skipped["pair"][1][0]  # type: ignore[no-any-return]

    measure_layers([first, nn.Identity(), last], torch.ones(2), skips={2: [0]}, repeats=2)
    assert seen == [(3, 3)] * 3


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats is 0"):
        measure_layers([slow], torch.ones(1), repeats=0)
