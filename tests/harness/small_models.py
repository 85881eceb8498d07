"""What the one-process tests of the engine share: tiny models, their data, and a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Regression(nn.Module):
    """Four inputs, one output; returns the mean square, or what a subclass makes of the predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 1)

    def predict(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.to(self.first.weight.dtype))))

    def forward(self, x: Tensor) -> Any:
        return self.predict(x).float().pow(2).mean()


def seeded(make: Any = Regression, seed: int = 0) -> Any:
    """The model that `make` makes under a seed."""
    torch.manual_seed(seed)
    return make()


def inputs(step: int = 0, samples: int = 4) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(100 + step))


def config(**changes: Any) -> dict[str, Any]:
    """AdamW in fp32 with micro-batches of 2 and no progress lines, changed at the top level."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "steps_per_print": 0,
        **changes,
    }


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in module.named_parameters()}


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
