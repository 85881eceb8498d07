"""Two small language models: a GPT (pre-norm transformer) and an LSTM.

Both map a batch of token ids [batch, length] (int64) to logits [batch, length, vocabulary], or, given targets of the
same shape, to the mean cross-entropy in nats as a scalar.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from partita.nn.functional import linear_cross_entropy
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a language model.

    width: of the hidden states; a multiple of `heads`.
    embedding: its width; None: as `width`.
    chunked_loss: whether the loss is made of chunks of tokens, so that the logits never exist as a whole.
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    embedding: int | None = None
    chunked_loss: bool = False

    @property
    def embedding_width(self) -> int:
        return self.width if self.embedding is None else self.embedding


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer of four times the width, each with a layer norm and a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.contract(F.gelu(self.expand(self.feed_forward_norm(x))))
        return x


class GPT(nn.Module):
    """A decoder-only transformer with learned positions; the embedding and the output layer share their weight.

    An embedding of another width than the blocks is mapped to theirs, and their output back to its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.width, config.embedding_width
        self.tokens = nn.Embedding(config.vocabulary, embedding)
        self.positions = nn.Embedding(config.context, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.into = nn.Identity() if embedding == width else nn.Linear(embedding, width, bias=False)
        self.back = nn.Identity() if embedding == width else nn.Linear(width, embedding, bias=False)
        self.head = nn.Linear(embedding, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(_initialize)
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention_out, block.contract):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)
        for layer in (self.into, self.back):
            if isinstance(layer, nn.Linear):  # which keep the size of what goes through them
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.into(self.tokens(tokens)) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return _logits_or_loss(self.back(self.norm(x)), self.head, targets, self.config)


class LSTM(nn.Module):
    """Stacked LSTM layers between an embedding and an output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.embedding_width)
        self.lstm = nn.LSTM(config.embedding_width, config.width, config.layers, batch_first=True)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        hidden, _ = self.lstm(self.tokens(tokens))
        return _logits_or_loss(hidden, self.head, targets, self.config)


MODELS: dict[str, type[GPT] | type[LSTM]] = {"gpt": GPT, "lstm": LSTM}


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _logits_or_loss(hidden: Tensor, head: nn.Linear, targets: Tensor | None, config: ModelConfig) -> Tensor:
    if targets is not None and config.chunked_loss:
        return linear_cross_entropy(hidden, head.weight, targets, head.bias)
    logits: Tensor = head(hidden)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
