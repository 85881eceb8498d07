"""Training data over two ranks: samples of a DataLoader are shared, and ranks with different data are told."""

from __future__ import annotations

from typing import Any

import partita
import pytest
import torch
import torch.distributed as dist
from small_models import seeded
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

IDS = list(range(12))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(IDS)


def _epochs(kind: str) -> list[list[list[int]]]:
    loaders = {
        "shuffled": lambda: DataLoader(IDS, 3, shuffle=True),
        "in order": lambda: DataLoader(IDS, 3),
        "distributed": lambda: DataLoader(IDS, 3, sampler=DistributedSampler(IDS, shuffle=False)),
        "stream": lambda: DataLoader(Stream(), 3),
    }
    engine, _, loader, _ = partita.initialize(seeded(), training_data=loaders[kind](), config={"steps_per_print": 0})
    assert (engine.train_micro_batch_size_per_gpu(), engine.train_batch_size()) == (3, 6)
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    engine.destroy()
    return epochs


@pytest.mark.parametrize("kind", ["shuffled", "in order", "distributed", "stream"])
def test_ranks_share_the_samples_of_a_loader(ranks, kind):
    """F14: each sample once in an epoch, not once for each rank."""
    per_rank = ranks(2).run(_epochs, kind)
    for epoch in range(2):
        seen = [sample for each in per_rank for batch in each[epoch] for sample in batch]
        assert sorted(seen) == IDS
        assert [len(each[epoch]) for each in per_rank] == [2, 2]
    if kind != "shuffled":
        assert per_rank[0][0] == [[0, 2, 4], [6, 8, 10]]


def _refused(kind: str) -> str:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(5 + rank)
    data = {
        "length": IDS[: 12 - 3 * rank],
        "seed": DataLoader(IDS, 3, shuffle=True, generator=generator),
        "order": DataLoader(IDS, 3, shuffle=bool(rank)),
        "replica": DataLoader(IDS, 3, sampler=DistributedSampler(IDS, 2, 1 - rank)),
    }
    with pytest.raises(ValueError) as raised:
        partita.initialize(seeded(), training_data=data[kind], config={"train_micro_batch_size_per_gpu": 3})
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("length", ["the number of samples in the training data is 12 on rank 0 and 9 on rank 1"]),
        ("seed", ["ranks [1]", "'seed': {}"]),
        ("order", ["ranks [1]", "'shuffle': {}"]),
        ("replica", ["DistributedSampler for rank {}"]),
    ],
)
def test_ranks_with_different_data_are_told_before_they_train(ranks, kind, words):
    """They would see samples twice, or wait for each other for ever; the error is on all ranks."""
    own = {"length": (12, 9), "seed": (5, 6), "order": (False, True), "replica": (1, 0)}[kind]
    for message, value in zip(ranks(2).run(_refused, kind), own, strict=True):
        assert [word for word in words if word.format(value) not in message] == [], message
