"""torch.distributed.pipelining trains the same layers to the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from partita.pipeline import PipelineModule
from pipelines import Shape, Trained, config_for, cross_entropy, merged, micro_batch, train
from torch import Tensor, nn
from torch.distributed import pipelining

MICRO_BATCHES, STEPS = 4, 3


class Layers(nn.Module):
    """The layers of a stage as torch wants them: a module of one tensor."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(stage.children())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _by_torch(chunks: int) -> dict[str, Tensor]:
    """The weights of this rank after some steps of SGD."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model: PipelineModule = Shape().module(ranks)
    model.build(list(range(ranks)) * chunks)
    device = torch.device("cpu")
    stages = [
        pipelining.PipelineStage(Layers(stage), number, ranks * chunks, device)
        for number, stage in model.stages.items()
    ]
    schedule: Any
    if chunks > 1:
        schedule = pipelining.ScheduleInterleaved1F1B(stages, MICRO_BATCHES, loss_fn=cross_entropy)
    else:
        schedule = pipelining.Schedule1F1B(stages[0], MICRO_BATCHES, loss_fn=cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        inputs, labels = map(torch.cat, zip(*(micro_batch(step, m) for m in range(MICRO_BATCHES)), strict=True))
        optimizer.zero_grad()
        schedule.step(*([inputs] if rank == 0 else []), target=labels if rank == ranks - 1 else None)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_weights_are_those_of_torch(ranks, chunks):
    expected: dict[str, Tensor] = {}
    for weights in ranks(2).run(_by_torch, chunks):
        expected.update(weights)
    config = config_for(MICRO_BATCHES, pipeline={"schedule": "interleaved" if chunks > 1 else "1f1b"})
    ours: Trained = merged(ranks(2).run(partial(train, steps=STEPS), partial(Shape().module, 2), config))
    assert ours.weights.keys() == expected.keys()
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
