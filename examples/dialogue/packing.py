"""Rows of tokens for a causal language model: a dialogue in each, or several that do not see each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dialogue.dialogues import Encoded

IGNORED = -100  # the target of a token that counts in no loss
Row = tuple[Encoded, ...]


class Batch(NamedTuple):
    """What a Hugging Face causal language model takes, and what it is to say.

    Attributes:
        input_ids, position_ids: [rows, length] int64; positions begin anew with each dialogue.
        attention_mask: [rows, 1, length, length], added to the attention's scores: 0 for earlier tokens of the same
            dialogue, else the lowest number of its dtype.
        targets: [rows, length] int64: the next token where it is the assistant's, else IGNORED.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def pack(dialogues: Sequence[Encoded], context: int) -> list[Row]:
    """Puts each dialogue into the first row that has room for it; rows have at most `context` tokens."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for dialogue in dialogues:
        length = len(dialogue.ids)
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([])
            room.append(context)
            place = len(rows) - 1
        rows[place].append(dialogue)
        room[place] -= length
    return [tuple(row) for row in rows]


def valid_tokens(rows: Sequence[Row]) -> int:
    """How many tokens of these rows count in the loss: the first token of a dialogue follows nothing."""
    return sum(sum(dialogue.answers[1:]) for row in rows for dialogue in row)


def collate(rows: Sequence[Row], pad: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows as tensors, as long as the longest row; `dtype`: that of the model, for the mask."""
    length = max([1, *(sum(len(dialogue.ids) for dialogue in row) for row in rows)])
    ids = torch.full((len(rows), length), pad)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    targets = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        start = 0
        for number, dialogue in enumerate(row):
            here, end = torch.tensor(dialogue.ids, dtype=torch.int64), start + len(dialogue.ids)
            ids[i, start:end] = here
            positions[i, start:end] = torch.arange(len(here))
            segments[i, start:end] = number
            counts = torch.tensor(dialogue.answers[1:], dtype=torch.bool)
            targets[i, start : end - 1] = torch.where(counts, here[1:], IGNORED)
            start = end
    return Batch(ids, positions, block_causal_mask(segments, dtype), targets)


def block_causal_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, length] numbers of dialogues -> [rows, 1, length, length]: each token sees those before it in its own."""
    length = segments.shape[1]
    sees = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class Arrangement:
    """How dialogues become rows: packed or one in each, at most `context` tokens long."""

    context: int
    packs: bool

    def rows(self, dialogues: Sequence[Encoded]) -> list[Row]:
        return pack(dialogues, self.context) if self.packs else [(dialogue,) for dialogue in dialogues]


class Rows:
    """Rows epoch after epoch, each in an order of its own; the same for the same seed, wherever one begins to read."""

    def __init__(self, dialogues: Sequence[Encoded], arrangement: Arrangement, seed: str) -> None:
        self._dialogues, self._arrangement, self._seed = dialogues, arrangement, seed
        self._rows: list[Row] = []
        self._epochs = 0

    def take(self, first: int, count: int) -> list[Row]:
        """The rows `first` to `first + count` of all epochs in a line."""
        while len(self._rows) < first + count:
            order = list(self._dialogues)
            random.Random(f"{self._seed}/{self._epochs}").shuffle(order)
            rows = self._arrangement.rows(order)
            random.Random(f"{self._seed}/{self._epochs}/rows").shuffle(rows)  # the first rows are the fullest
            self._rows += rows
            self._epochs += 1
        return self._rows[first : first + count]

    def in_an_epoch(self) -> int:
        """Rows of the first epoch."""
        return len(self._arrangement.rows(self._dialogues))
