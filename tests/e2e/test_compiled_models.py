"""F8: models compiled by torch.compile train as they are."""

from __future__ import annotations

import shutil
from typing import Any

import partita
import pytest
import torch
from ranks import RankError
from support import base_config, make_model, train
from torch import Tensor, nn

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


class Scripted(nn.Module):
    """A model with a part that torch.jit has compiled, or that is as it was."""

    def __init__(self, is_script: bool) -> None:
        super().__init__()
        self.first, part = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.part: Any = torch.jit.script(part) if is_script else part
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x))).square().mean()


def train_scripted(stage: int, is_script: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Scripted(is_script)
    engine = partita.Engine(model=model, config=base_config(stage=stage))
    for step in range(3):
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * step + engine.global_rank))
        engine.backward(engine(x))
        engine.step()
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


def test_models_with_a_script_of_torchscript_train_as_they_are(ranks):
    for stage in STAGES:
        for expected, weights in zip(
            ranks(2).run(train_scripted, stage, False), ranks(2).run(train_scripted, stage, True), strict=True
        ):
            assert weights.keys() == expected.keys()
            torch.testing.assert_close(weights, expected)
    with pytest.raises(
        RankError, match=r"module 'part' is compiled \(torch.jit\), which ZeRO stage 3 does not support"
    ):
        ranks(2).run(train_scripted, 3, True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("stage", STAGES)
def test_models_compiled_by_inductor_train_as_they_are(ranks, stage):
    """F8, with the default backend."""
    expected = ranks(2).run(train_compiled, stage, None)
    run = ranks(2).run(train_wrapped, stage, "inductor")
    for rank in range(2):
        assert_same_run(run[rank], expected[rank], 1e-3)
