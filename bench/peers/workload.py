"""What is trained: models whose weights are the same each time they are built, and the data of each rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Last, so that no file of the examples hides one beside this.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from language.models import GPT, ModelConfig

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """What every engine is given. `clip` is the largest gradient norm; 0 leaves gradients as they are."""

    build_model: Callable[[], nn.Module]
    numel: int
    dtype: str = "fp32"
    clip: float = 0.0
    deepspeed_adam: str = "torch"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


def gpt() -> nn.Module:
    """33.7 million parameters: a quarter of them in the embedding, which is the output layer as well."""
    torch.manual_seed(0)
    model: nn.Module = GPT(ModelConfig(vocabulary=16384, context=128, layers=8, heads=8, width=512))
    return model


class Chain(nn.Module):
    """Many small layers, one after the other: 2 parameters each, and next to nothing to compute.

    Orthogonal weights keep the activations' size through hundreds of layers without a residual connection.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for parameter in self.parameters():
            (nn.init.orthogonal_ if parameter.dim() == 2 else nn.init.zeros_)(parameter)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.mse_loss(x.float(), targets)


class Vectors(nn.Module):
    """Parameters alone; the gradient of each element of the loss is the constant `slope`."""

    slope = 1e-3

    def __init__(self, tensors: int, numel: int) -> None:
        super().__init__()
        self.vectors = nn.ParameterList(torch.randn(numel) * 0.02 for _ in range(tensors))

    def forward(self) -> Tensor:
        sums = [(vector * self.slope).sum(dtype=torch.float32) for vector in self.vectors]
        return torch.stack(sums).sum()


def tiny() -> nn.Module:
    """1,000 parameters in 500 layers."""
    torch.manual_seed(0)
    return Chain(layers=500, width=16)


def vectors() -> nn.Module:
    """40 million parameters in 100 tensors."""
    torch.manual_seed(0)
    return Vectors(tensors=100, numel=400_000)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gpt_batch(rank: int, size: int, length: int) -> Batch:
    """Tokens and targets [size, length] of a rank: drawn once, so that the loss falls as they are learnt by heart."""
    generator = torch.Generator().manual_seed(1 + rank)
    tokens = torch.randint(16384, (size, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def tiny_batch(rank: int, size: int, length: int) -> Batch:
    """Inputs and targets [size x length, 16] of a rank."""
    generator = torch.Generator().manual_seed(1 + rank)
    inputs, targets = torch.randn(2, size * length, 16, generator=generator)
    return inputs, targets
