"""The GPT of models.py as a list of layers, each of which gets the output of the one before.

Every layer makes its own initial weights, so that it can be built by itself, where it is needed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from language.models import Block, ModelConfig

STD = 0.02  # of initial weights


class Tokens(nn.Embedding):
    """Token ids [batch, length] (int64) to states [batch, length, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocabulary, config.width)
        nn.init.normal_(self.weight, std=STD)


class Positions(nn.Module):
    """Adds a learned vector for each place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.context, config.width)
        nn.init.normal_(self.embedding.weight, std=STD)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding.weight[: x.shape[1]]


class PipelineBlock(Block):
    """A block with the weights that GPT gives to its blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for layer in (self.qkv, self.attention_out, self.expand, self.contract):
            writes_residual = layer in (self.attention_out, self.contract)
            nn.init.normal_(layer.weight, std=STD / (2 * config.layers) ** 0.5 if writes_residual else STD)
            nn.init.zeros_(layer.bias)


class Norm(nn.LayerNorm):
    """The norm before the output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.width)


class Head(nn.Linear):
    """States to logits [batch, length, vocabulary], with a weight of its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.weight, std=STD)


def logits(tokens: Tokens, x: Tensor) -> Tensor:
    """The output layer that has the weight of the token embedding."""
    return F.linear(x, tokens.weight)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
