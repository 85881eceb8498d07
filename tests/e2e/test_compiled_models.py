"""F8: models compiled by torch.compile train as they are."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from support import base_config, make_model, train
from torch import Tensor

STAGES = (0, 1, 2)
Run = tuple[list[float], dict[str, Tensor], list[float]]


def train_compiled(stage: int, backend: str | None) -> Run:
    model = make_model()
    if backend is not None:
        model.compile(backend=backend)
    run = train(base_config(stage=stage, gradient_accumulation_steps=2), 4, model)
    return run if backend is None else was_compiled(run)


def was_compiled(run: Run) -> Run:
    """The run, if the compiler made graphs for it; otherwise it would be compared with itself."""
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    torch._dynamo.reset()  # the next model is compiled anew
    return run


def train_wrapped(stage: int, backend: str) -> Run:
    """torch.compile(model) in place of model.compile(): another module, whose names have a prefix."""
    compiled: Any = torch.compile(make_model(), backend=backend)
    run = train(base_config(stage=stage, gradient_accumulation_steps=2), 4, compiled)
    losses, weights, norms = was_compiled(run)
    return losses, {name.removeprefix("_orig_mod."): value for name, value in weights.items()}, norms


def assert_same_run(run: Any, expected: Any, tolerance: float) -> None:
    for got, wanted in zip(run, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_compiled_models_train_as_they_are(ranks):
    """F8: graphs that read parameters which are views, whose storage the engine writes to."""
    for stage in STAGES:
        expected = ranks(2).run(train_compiled, stage, None)
        for run in (ranks(2).run(train_compiled, stage, "aot_eager"), ranks(2).run(train_wrapped, stage, "aot_eager")):
            for rank in range(2):
                assert_same_run(run[rank], expected[rank], 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("stage", STAGES)
def test_models_compiled_by_inductor_train_as_they_are(ranks, stage):
    """F8, with the default backend."""
    expected = ranks(2).run(train_compiled, stage, None)
    run = ranks(2).run(train_wrapped, stage, "inductor")
    for rank in range(2):
        assert_same_run(run[rank], expected[rank], 1e-3)
