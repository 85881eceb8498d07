"""Engines of one process on any device, for the tests that run on a GPU where there is one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import partita
import torch
from on_gpu import CPU
from one_as_several import gathering
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)  # 3: parameters come and go, though the process is alone
WHOLE: dict[str, Any] = {"bf16": {"enabled": True}}
SPLIT: dict[str, Any] = {"bf16": {"enabled": True, "master_weights": "split"}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01, "warmup_type": "linear"}}
HOST: dict[str, Any] = {"device": "cpu"}


class Net(nn.Module):
    """Odd sizes, a parameter of one element and one of none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(9, 37)
        self.nothing = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(37, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.scale.dtype))) * self.scale
        return (self.last(hidden).float() - x[:, :5]).square().mean() + self.nothing.sum()


class Deep(nn.Module):
    """Equal blocks, so that stage 3 gathers one while another computes."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.blocks[0].weight.dtype)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x.float().square().mean()


def config(stage: int = 0, **changes: Any) -> dict[str, Any]:
    """AdamW and small units. `zero_optimization` adds to these."""
    zero = {"stage": stage, "reduce_bucket_size": 200, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "steps_per_print": 0,
        **changes,
        "zero_optimization": {**zero, **changes.get("zero_optimization", {})},
    }


def engine_of(model: nn.Module, **settings: Any) -> partita.Engine:
    """In stage 3 one that gathers."""
    made = config(**settings)
    gathers: AbstractContextManager[Any] = gathering() if made["zero_optimization"]["stage"] == 3 else nullcontext()
    with gathers:
        return partita.Engine(model, config=made)


def engine_on(device: torch.device, make: type[nn.Module] = Net, **settings: Any) -> partita.Engine:
    return engine_of(make().to(device), **settings)


def samples(step: int, count: int = 2, device: torch.device = CPU, width: int = 9) -> Tensor:
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(step), dtype=torch.float32, device=CPU)
    return made.to(device)


def state_of(engine: partita.Engine) -> dict[str, Tensor]:
    """The weights, on the host."""
    return {name: value.cpu() for name, value in engine.module_state_dict().items()}


def assert_same(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name
