"""Gradients of autograd do not exist beside the flat buffers that they go into."""

from __future__ import annotations

import partita
import pytest
import torch
from torch import nn

LAYERS = 6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_complete_unit_gives_its_gradients_up(stage, overlap):
    """F7: in the first backward too, which learns how often gradients come. From stage 2 on there is no room for them
    before they are reduced."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(LAYERS)))
    zero = {"stage": stage, "reduce_bucket_size": 256, "overlap_comm": overlap}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": zero,
        "steps_per_print": 0,
    }
    engine, *_ = partita.initialize(model=model, config=config)
    alive = []
    first, *others = model.parameters()  # the first layer's gradient is the last to come
    first.register_post_accumulate_grad_hook(lambda _: alive.append(sum(type(p.grad) is torch.Tensor for p in others)))
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 16)).sum())
        engine.step()
    later = 0 if overlap or stage < 2 else LAYERS - 1
    assert alive == [later] * 3
