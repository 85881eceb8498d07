"""Models whose gradients come one by one: a chain of layers, and vectors of given sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from reference import Training, numbers
from torch import Tensor, nn

LAYERS = 6
WIDTH = 8


class Chain(nn.Module):
    """Layers of one parameter each, whose gradients arrive from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def chain_micro_batch(forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, WIDTH)))


CHAIN = Training(Chain, chain_micro_batch)


class Vectors(nn.Module):
    """One parameter for each size, each with a gradient of its own; 0 is a size."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors = nn.ParameterList(torch.randn(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.vectors[0].dtype)
        return sum((x[i, : v.numel()] * (v + v * v)).sum().float() for i, v in enumerate(self.vectors))


def vectors_micro_batch(sizes: tuple[int, ...], forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, len(sizes), max(sizes))))


def vectors(*sizes: int) -> Training:
    return Training(partial(Vectors, sizes), partial(vectors_micro_batch, sizes))
