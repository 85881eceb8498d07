"""An embedding learned before the language model, from which tokens stand beside which.

Each token of the vocabulary has a row: how its neighbours are distributed. An autoencoder maps a row to a few numbers
and back; tokens that are used alike get similar numbers, and these are the embedding that the language model begins
with. For square roots of probabilities the mean squared error is the Hellinger distance (Lebret and Collobert, "Word
Embeddings through Hellinger PCA", 2014).
"""

from __future__ import annotations

from typing import Any

import partita
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

CONTEXTS = 1000  # neighbours that are told apart: the most frequent tokens. The others are one
_ROWS_AT_ONCE = 512  # when their error or their codes are asked for
_BATCH = 128  # rows of a rank in a step, if there are as many


class Autoencoder(nn.Module):
    """Linear maps to a low dimension and back."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, width)
        self.decoder = nn.Linear(width, features)

    def forward(self, rows: Tensor, encodes: bool = False) -> Tensor:
        """rows: [batch, features]. The mean squared error of what comes back, or the codes [batch, width]."""
        codes: Tensor = self.encoder(rows)
        return codes if encodes else F.mse_loss(self.decoder(codes), rows)


class Rows(Dataset[tuple[Tensor]]):
    """Sample i is the row of token i; `values`: [vocabulary, features] float32."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.values[index],)


def neighbour_rows(tokens: Tensor, vocabulary: int, contexts: int = CONTEXTS) -> Tensor:
    """[vocabulary, 2 x (contexts + 1)] float32: by token, its neighbours to the left and to the right.

    Values are square roots of probabilities, less their mean over tokens, and then all scaled to a mean square of 1: so
    the mean squared error is the share of the variance that an autoencoder loses.
    """
    tokens = tokens.long()
    contexts = min(contexts, vocabulary)
    column = torch.full((vocabulary,), contexts)
    column[torch.bincount(tokens, minlength=vocabulary).argsort(descending=True, stable=True)[:contexts]] = (
        torch.arange(contexts)
    )
    sides = []
    for token, neighbour in ((tokens[1:], tokens[:-1]), (tokens[:-1], tokens[1:])):
        pairs = torch.bincount(token * (contexts + 1) + column[neighbour], minlength=vocabulary * (contexts + 1))
        counts = pairs.view(vocabulary, contexts + 1).float()
        sides.append((counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt())
    rows = torch.cat(sides, 1)
    rows -= rows.mean(0)
    return rows / rows.square().mean().sqrt()


def lost_variance(engine: partita.Engine, rows: Rows) -> float:
    """Mean squared error over all rows. All ranks call it."""
    total = 0.0
    for part in rows.values.split(_ROWS_AT_ONCE):
        total += engine.eval_batch([part.to(engine.device)]).item() * len(part)
    return total / len(rows)


def embedding_of(engine: partita.Engine, rows: Rows) -> Tensor:
    """The codes of all tokens, [vocabulary, width] float32, with mean 0 and standard deviation 1. All ranks call it."""
    parts = rows.values.split(_ROWS_AT_ONCE)
    codes = torch.cat([engine.eval_batch([part.to(engine.device), True]).float().cpu() for part in parts])
    codes = codes - codes.mean(0)
    return codes / codes.std()


def begin_with(embedding: nn.Embedding, values: Tensor) -> None:
    """Gives an embedding these values, in the size that its own random ones have."""
    with torch.no_grad():
        embedding.weight.copy_(values * embedding.weight.std())


def config(language_model: dict[str, Any], steps: int, learning_rate: float, *, rows_of_rank: int) -> dict[str, Any]:
    """The engine's config for the autoencoder: the language model's seed, stage and checkpoints, in fp32."""
    kept = {key: language_model[key] for key in ("zero_optimization", "seed", "checkpoint") if key in language_model}
    return {
        **kept,
        "train_micro_batch_size_per_gpu": max(1, min(_BATCH, rows_of_rank)),
        "optimizer": {"type": "AdamW", "params": {"lr": learning_rate, "weight_decay": 0.0}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": steps, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
        "steps_per_print": 0,
    }
