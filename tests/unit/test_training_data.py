"""A DataLoader as training data: its samples, batch size, collate function and settings, shared between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import partita
import pytest
import torch
from partita import ConfigError
from partita.data import ShardedLoader
from small_models import config, inputs, seeded
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

IDS = list(range(10))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(IDS)


class AskingWorkers(list[int]):
    """Its samples are what the worker that loads them was told."""

    told = -1

    def __getitem__(self, index: Any) -> Any:
        return self.told


def tell(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.told = 100 + worker


def taken(data: Any, settings: dict[str, Any] | None = None, **arguments: Any) -> ShardedLoader:
    """The loader that `initialize()` makes."""
    if settings is None:
        settings = {"optimizer": {"type": "AdamW"}, "steps_per_print": 0}
    engine, _, loader, _ = partita.initialize(seeded(), training_data=data, config=settings, **arguments)
    engine.destroy()
    assert loader is not None
    return loader


def epoch(loader: ShardedLoader) -> list[list[int]]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


def seeded_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- what is taken over


def test_a_loader_gives_its_batches_and_not_batches_of_batches():
    """F14, as the articles write it."""
    assert epoch(taken(DataLoader(IDS, batch_size=5))) == [IDS[:5], IDS[5:]]


def test_the_batch_size_is_the_loaders_where_the_config_has_none():
    engine, _, loader, _ = partita.initialize(
        seeded(), training_data=DataLoader(IDS, batch_size=5), config={"gradient_accumulation_steps": 3}
    )
    assert (engine.train_micro_batch_size_per_gpu(), engine.train_batch_size()) == (5, 15)
    assert loader.sharding.micro_batch_size == 5
    engine.destroy()
    assert taken(DataLoader(IDS, batch_size=5), {"train_batch_size": 10}).sharding.micro_batch_size == 5
    assert taken(DataLoader(IDS, batch_size=2), config()).sharding.micro_batch_size == 2


def test_training_is_that_of_the_data_set():
    rows = [(row,) for row in inputs(samples=8)]
    losses = []
    for data in (rows, DataLoader(rows, batch_size=2, shuffle=True)):
        engine, *_ = partita.initialize(seeded(), training_data=data, config=config())
        losses.append([engine.train_batch().item() for _ in range(6)])
        engine.destroy()
    assert losses[0] == losses[1]


SHUFFLED: dict[str, Callable[[], DataLoader[int]]] = {
    "shuffle": lambda: DataLoader(IDS, batch_size=2, shuffle=True),
    "RandomSampler": lambda: DataLoader(IDS, batch_size=2, sampler=RandomSampler(IDS)),
    "a BatchSampler of torch": lambda: DataLoader(IDS, batch_sampler=BatchSampler(RandomSampler(IDS), 2, False)),
    "DistributedSampler": lambda: DataLoader(IDS, batch_size=2, sampler=DistributedSampler(IDS, 1, 0, seed=1234)),
}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_shuffled_loader_has_the_order_of_the_configs_seed(kind):
    """The same on all ranks, new in each epoch, and resumable."""
    loader = taken(SHUFFLED[kind]())
    expected = taken(IDS, config())
    first, second = epoch(loader), epoch(loader)
    assert [first, second] == [epoch(expected), epoch(expected)]
    assert first != second
    assert sorted(chain.from_iterable(first)) == IDS


def test_a_seed_of_the_loader_is_the_seed_of_the_order():
    by_generator = [taken(DataLoader(IDS, 2, shuffle=True, generator=seeded_generator(seed))) for seed in (1, 1, 2)]
    orders = [epoch(loader) for loader in by_generator]
    assert orders[0] == orders[1] != orders[2]
    by_sampler = taken(DataLoader(IDS, 2, sampler=DistributedSampler(IDS, 1, 0, seed=2)))
    assert epoch(by_sampler) == orders[2]


def test_without_shuffling_the_order_stays():
    for loader in (
        DataLoader(IDS, 2),
        DataLoader(IDS, 2, sampler=SequentialSampler(IDS)),
        DataLoader(IDS, 2, sampler=DistributedSampler(IDS, 1, 0, shuffle=False)),
    ):
        assert list(chain.from_iterable(epoch(taken(loader)))) == IDS


def test_a_subset_is_a_subset():
    loader = taken(DataLoader(IDS, 2, sampler=SubsetRandomSampler([1, 3, 5, 7])))
    assert sorted(chain.from_iterable(epoch(loader))) == [1, 3, 5, 7]


@pytest.mark.parametrize(("drop_last", "expected"), [(True, [[0, 1, 2, 3], [4, 5, 6, 7]]), (False, 3)])
def test_drop_last_is_the_loaders(drop_last, expected):
    """Kept, the last batch is filled up: all batches of all ranks have one size."""
    batches = epoch(taken(DataLoader(IDS, 4, drop_last=drop_last)))
    assert batches == ([*([[0, 1, 2, 3], [4, 5, 6, 7]]), [8, 9, 0, 1]] if expected == 3 else expected)


def test_few_samples_are_repeated_unless_the_last_batch_is_dropped():
    assert epoch(taken(DataLoader(IDS[:3], 4))) == [[0, 1, 2, 0]]
    with pytest.raises(ValueError, match=r"3 samples.*train_micro_batch_size_per_gpu 4.*train_batch_size"):
        taken(DataLoader(IDS[:3], 4, drop_last=True))


def test_a_stream_in_a_loader():
    """The last, incomplete batch is dropped, so that all ranks have the same number."""
    loader = taken(DataLoader(Stream(), batch_size=4))
    assert epoch(loader) == epoch(loader) == [IDS[:4], IDS[4:8]]


def test_the_collate_function_is_the_loaders_or_that_of_the_call():
    assert epoch(taken(DataLoader(IDS, 5, collate_fn=lambda samples: ["own", *samples])))[0] == ["own", *IDS[:5]]
    assert epoch(taken(DataLoader(IDS, 5), collate_fn=tuple))[0] == tuple(IDS[:5])
    assert epoch(taken(DataLoader(IDS, 5, collate_fn=tuple), collate_fn=tuple))[0] == tuple(IDS[:5])


def test_workers_are_the_loaders():
    loader = taken(DataLoader(AskingWorkers(IDS), 5, num_workers=2, worker_init_fn=tell, prefetch_factor=1, timeout=60))
    assert epoch(loader) == [[100] * 5, [101] * 5]
    assert (loader.num_workers, loader.options["prefetch_factor"], loader.options["timeout"]) == (2, 1, 60)
    assert taken(DataLoader(IDS, 5, pin_memory=True)).options["pin_memory"] is True


# -- what is refused


class OwnSampler(SequentialSampler):
    pass


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "micro-batch": (
        lambda: taken(DataLoader(IDS, 4), config()),
        ConfigError,
        ["batch_size = 4", "train_micro_batch_size_per_gpu = 2"],
    ),
    "train batch": (
        lambda: taken(DataLoader(IDS, 4), {"train_batch_size": 6}),
        ConfigError,
        ["batch_size = 4", "train_batch_size = 6"],
    ),
    "train batch and accumulation": (
        lambda: taken(DataLoader(IDS, 4), {"train_batch_size": 6, "gradient_accumulation_steps": 3}),
        ConfigError,
        ["batch_size = 4", "6 is not 4 x 3 x 1 = 12"],
    ),
    "weighted sampler": (
        lambda: taken(DataLoader(IDS, 2, sampler=WeightedRandomSampler([1.0] * 10, 10))),
        ValueError,
        ["WeightedRandomSampler", "engine.train_batch(loader)"],
    ),
    "sampler of one's own": (lambda: taken(DataLoader(IDS, 2, sampler=OwnSampler(IDS))), ValueError, ["OwnSampler"]),
    "with replacement": (
        lambda: taken(DataLoader(IDS, 2, sampler=RandomSampler(IDS, replacement=True))),
        ValueError,
        ["with replacement"],
    ),
    "fewer samples": (
        lambda: taken(DataLoader(IDS, 2, sampler=RandomSampler(IDS, num_samples=4))),
        ValueError,
        ["num_samples"],
    ),
    "batches of one's own": (
        lambda: taken(DataLoader(IDS, batch_sampler=[[0, 1], [2]])),
        ValueError,
        ["has a list", "engine.train_batch(loader)"],
    ),
    "no batches": (lambda: taken(DataLoader(IDS, batch_size=None)), ValueError, ["batch_size=None"]),
    "two collate functions": (
        lambda: taken(DataLoader(IDS, 2, collate_fn=tuple), collate_fn=list),
        ValueError,
        ["collate_fn", "one of them"],
    ),
    "sampler of another rank": (
        lambda: taken(DataLoader(IDS, 2, sampler=DistributedSampler(IDS, 4, 3))),
        ValueError,
        ["rank 3 of 4", "rank 0 of 1"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_or_contradicts_is_named(what):
    """Promise 7."""
    make, error, words = REFUSED[what]
    with pytest.raises(error) as raised:
        make()
    assert [word for word in words if word not in str(raised.value)] == [], raised.value
