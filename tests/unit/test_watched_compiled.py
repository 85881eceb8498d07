"""Who watches a model that torch.compile() was given: it is compiled all the same, once, and its operations count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from recorded import own_rows
from small_models import config, inputs, seeded
from torch import Tensor, nn

STEPS = 5
FLOPS = 3 * 2 * 2 * (4 * 5 + 5 * 1)  # of Regression, in a step of 2 samples
WATCHED = {
    "recorded": lambda folder: {"monitor": {"dir": str(folder)}},
    "profiled": lambda folder: {
        "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(folder / "table")}
    },
    "traced": lambda folder: {"trace": {"steps": [2, 3], "path": str(folder / "trace.json")}},
}


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
@pytest.mark.parametrize("watched", WATCHED)
def test_a_compiled_model_is_compiled_once_and_runs_so_in_every_step(tmp_path: Path, watched: str, in_place: bool):
    graphs: list[Any] = []
    runs: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            runs.append(len(graphs))
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    model: Any = seeded()
    if in_place:
        model.compile(backend=backend, fullgraph=True)
    else:
        model = torch.compile(model, backend=backend, fullgraph=True)
    engine = partita.Engine(model, config=config(**WATCHED[watched](tmp_path)))
    for step in range(STEPS):
        engine.backward(engine(inputs(step, 2)))
        engine.step()
    engine.destroy()
    torch._dynamo.reset()
    assert len(graphs) == 1 and runs == [1] * STEPS
    if watched == "recorded":
        row = own_rows(tmp_path)[1]
        assert row["flops_per_s"] * row["step_ms"] / 1e3 == pytest.approx(FLOPS)


class Choosing(nn.Module):
    """With an operation that has operations in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        torch.cond(y.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (y.detach(),))
        return y.pow(2).mean()


def test_operations_that_have_others_in_them_do_not_end_the_run(tmp_path: Path):
    engine = partita.Engine(seeded(Choosing), config=config(monitor={"dir": str(tmp_path)}))
    for step in range(2):
        engine.backward(engine(inputs(step, 2)))
        engine.step()
    engine.destroy()
    assert own_rows(tmp_path)[1]["flops_per_s"] > 0
