"""What pipelines train: one GPT as layers, cut at the same places for every engine, and its data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from partita.pipeline import balanced
from torch import Tensor, nn

# Last, so that no file of the examples hides one beside this.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from language.models import ModelConfig
from language.pipeline_layers import Head, Norm, PipelineBlock, Positions, Tokens

MicroBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PipelineTask:
    """What every engine is given.

    Attributes:
        model: sizes.
        micro_batches: of a step.
        size, length: sequences of a micro-batch, and their tokens.
        costs: of the layers, as they are divided into stages.
    """

    model: ModelConfig
    micro_batches: int
    size: int
    length: int
    costs: tuple[float, ...]
    deepspeed_adam: str = "torch"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def makers(self) -> list[Callable[[], nn.Module]]:
        """One per layer; each builds the same weights whenever it is called."""
        types = [Tokens, Positions, *[PipelineBlock] * self.model.layers, Norm, Head]
        return [_Seeded(type_, self.model, seed) for seed, type_ in enumerate(types)]

    def bounds(self, stages: int) -> list[range]:
        """The layers of each stage."""
        return balanced(self.costs, stages)

    def layers(self, which: Sequence[int]) -> nn.Sequential:
        makers = self.makers()
        return nn.Sequential(*(makers[index]() for index in which))

    def data(self) -> list[MicroBatch]:
        """The micro-batches of every step: drawn once, so that the loss falls as they are learnt by heart."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.micro_batches, self.size, self.length + 1)
        tokens = torch.randint(self.model.vocabulary, shape, generator=generator)
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


@dataclass(frozen=True)
class _Seeded:
    type_: Callable[[ModelConfig], nn.Module]
    model: ModelConfig
    seed: int

    def __call__(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.type_(self.model)


def costs_by_operations(model: ModelConfig, length: int) -> tuple[float, ...]:
    """Multiplications per token: of the matrices, and of the attention over `length` tokens; look-ups cost none."""
    block = 12 * model.width**2 + 2 * length * model.width
    return (0.0, 0.0, *[float(block)] * model.layers, 0.0, float(model.width * model.vocabulary))
