"""Which samples each rank sees, and that a resumed run sees those of an unbroken one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from partita.data import ShardedLoader, ShardedSampler, Sharding
from torch.utils.data import IterableDataset

SIZES = st.integers(1, 40)
RANKS = st.integers(1, 5)
MICRO = st.integers(1, 5)


class Ids:
    """A map-style dataset whose samples are their ids."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class Generated:
    """An iterable that torch does not know."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        yield from range(self.length)


def sampler(length: int, rank: int, world_size: int, micro: int, **options: Any) -> ShardedSampler:
    options = {"shuffle": True, "seed": 7, **options}
    return ShardedSampler(length, Sharding(rank, world_size, micro, options.pop("seed")), **options)


def loader(dataset: Any, rank: int = 0, world_size: int = 1, micro: int = 1, **options: Any) -> ShardedLoader:
    options = {"seed": 7, "collate_fn": list, **options}
    return ShardedLoader(dataset, Sharding(rank, world_size, micro, options.pop("seed")), **options)


def global_batches(per_rank: list[list[list[int]]]) -> list[list[int]]:
    """All ranks' batches put back together, in the order of the samples."""
    ranks_of_batch = list(zip(*per_rank, strict=True))  # strict: every rank has the same number
    return [[sample for row in zip(*batches, strict=True) for sample in row] for batches in ranks_of_batch]


def flat(batches: Any) -> list[int]:
    return [sample for batch in batches for sample in batch]


# The sampler


@given(SIZES, RANKS, MICRO, st.booleans(), st.integers(0, 3))
def test_ranks_partition_the_epoch(length: int, world_size: int, micro: int, shuffle: bool, epoch: int) -> None:
    assume(length >= world_size * micro)
    samplers = [sampler(length, rank, world_size, micro, shuffle=shuffle) for rank in range(world_size)]
    batches = global_batches([list(each.batches(epoch)) for each in samplers])
    kept = length - length % (world_size * micro)
    assert flat(batches) == samplers[0].order(epoch).tolist()[:kept]
    assert len(set(flat(batches))) == kept and set(flat(batches)) <= set(range(length))
    assert all(each.num_batches() == len(batches) for each in samplers)
    assert sorted(samplers[0].order(epoch)) == list(range(length))


@given(SIZES, RANKS, MICRO, st.booleans())
def test_padding_goes_on_from_the_start_of_the_order(length: int, world_size: int, micro: int, shuffle: bool) -> None:
    samplers = [
        sampler(length, rank, world_size, micro, shuffle=shuffle, drop_last=False) for rank in range(world_size)
    ]
    batches = flat(global_batches([list(each.batches(2)) for each in samplers]))
    order = samplers[0].order(2).tolist()
    assert len(batches) == -(-length // (world_size * micro)) * world_size * micro
    assert batches == [order[position % length] for position in range(len(batches))]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_the_order_does_not_depend_on_the_world_size(world_size: int, micro: int) -> None:
    per_rank = [list(sampler(50, rank, world_size, micro).batches(3)) for rank in range(world_size)]
    assert global_batches(per_rank) == list(sampler(50, 0, 1, 12).batches(3))


def test_the_order_depends_on_epoch_and_seed_and_is_frozen() -> None:
    orders = {tuple(sampler(30, 0, 1, 1, seed=seed).order(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # Checkpoints of earlier releases rely on these numbers.
    assert sampler(8, 0, 1, 1, seed=1).order(0).tolist() == [1, 6, 0, 3, 7, 4, 2, 5]
    assert sampler(8, 0, 1, 1, seed=1).order(1).tolist() == [3, 2, 4, 0, 7, 1, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 0}, "at least one sample, got length 0"),
        (
            {"length": 11},
            r"11 samples, fewer than one global batch of 12 \(3 ranks x train_micro_batch_size_per_gpu 4\)",
        ),
        ({"world_size": 0}, "world_size must be an integer >= 1, got 0"),
        ({"rank": 3}, r"rank must be below world_size \(3\), got 3"),
        ({"rank": -1}, "rank must be an integer >= 0, got -1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be"),
        ({"micro_batch_size": 2.0}, "micro_batch_size must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_sampler_errors_name_the_argument(arguments: dict[str, Any], words: str) -> None:
    given = {"length": 24, "rank": 0, "world_size": 3, "micro_batch_size": 4, "seed": 0, **arguments}
    length = given.pop("length")
    with pytest.raises(ValueError, match=words):
        ShardedSampler(length, Sharding(**given), shuffle=True)


# The loader


def dataset_of(kind: str, length: int) -> Any:
    return {"map": Ids, "stream": Stream, "iterable": Generated}[kind](length)


@given(st.sampled_from(["map", "stream", "iterable"]), SIZES, RANKS, MICRO, st.booleans())
def test_ranks_see_the_dataset_once(kind: str, length: int, world_size: int, micro: int, drop_last: bool) -> None:
    drop_last = drop_last or kind != "map"
    global_batch = world_size * micro
    assume(length >= global_batch or not drop_last)
    loaders = [
        loader(dataset_of(kind, length), rank, world_size, micro, drop_last=drop_last) for rank in range(world_size)
    ]
    for epoch in range(2):
        batches = global_batches([list(each) for each in loaders])
        if kind != "map":
            assert flat(batches) == list(range(length - length % global_batch))
        elif drop_last:
            assert len(set(flat(batches))) == len(flat(batches)) == length - length % global_batch
        else:
            assert set(flat(batches)) == set(range(length))
        assert all(batch == global_batch for batch in map(len, batches))
        assert all(each.epoch == epoch + 1 for each in loaders)


@given(st.sampled_from(["map", "padded", "stream"]), st.integers(1, 14), RANKS, MICRO, st.data())
def test_resumed_sees_what_an_unbroken_run_sees(kind: str, length: int, world: int, micro: int, data: Any) -> None:
    assume(kind == "padded" or length >= world * micro)
    rank = data.draw(st.integers(0, world - 1))

    def fresh() -> ShardedLoader:
        dataset = Stream(length) if kind == "stream" else Ids(length)
        return loader(dataset, rank, world, micro, drop_last=kind != "padded")

    total = 2 * len(list(fresh())) + 2  # two epochs and a bit
    unbroken = list(islice(fresh().repeat(), total))
    for stop in range(total + 1):
        first = fresh()
        seen = list(islice(first.repeat(), stop))
        second = fresh()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + list(islice(second.repeat(), total - stop)) == unbroken


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(kind: str, num_workers: int) -> None:
    """22 samples, global batches of 4: 5 batches an epoch, which 2 workers share unevenly."""

    def fresh(workers: int) -> ShardedLoader:
        return loader(dataset_of(kind, 22), 1, 2, 2, num_workers=workers)

    unbroken = list(islice(fresh(0).repeat(), 12))
    assert list(islice(fresh(num_workers).repeat(), 12)) == unbroken
    for stop in (1, 4, 5, 6):  # within an epoch, one before its end, at its end, after it
        first = fresh(num_workers)
        seen = list(islice(first.repeat(), stop))
        second = fresh(num_workers)
        second.load_state_dict(first.state_dict())  # taken while workers have prefetched more
        assert seen + list(islice(second.repeat(), 12 - stop)) == unbroken


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("stop", range(8))
def test_resume_with_another_world_size(kind: str, stop: int) -> None:
    """Same global batch, cut otherwise: the same global batches follow."""

    def job(world_size: int, micro: int) -> list[ShardedLoader]:
        return [loader(dataset_of(kind, 30), rank, world_size, micro) for rank in range(world_size)]

    unbroken = list(islice(job(1, 12)[0].repeat(), 10))
    first = job(2, 6)
    seen = global_batches([list(islice(each.repeat(), stop)) for each in first])
    assert len({json.dumps(each.state_dict()) for each in first}) == 1  # any rank's state will do
    second = job(3, 4)
    for each in second:
        each.load_state_dict(first[0].state_dict())
    assert seen + global_batches([list(islice(each.repeat(), 10 - stop)) for each in second]) == unbroken


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 40), st.booleans())
def test_resume_with_another_global_batch(length: int, before: int, after: int, stop: int, padded: bool) -> None:
    """The next batch starts at the first sample not yet seen; a rest too small for one is the dropped tail."""
    assume(padded or length >= max(before, after))
    first = loader(Ids(length), micro=before, drop_last=not padded)
    stop = min(stop, len(first) - 1)
    seen = flat(islice(first.repeat(), stop))
    second = loader(Ids(length), micro=after, drop_last=not padded)
    second.load_state_dict(first.state_dict())
    rest = flat(second)
    order = ShardedSampler(length, Sharding(0, 1, 1, seed=7), shuffle=True)
    if padded or length - len(seen) >= after:
        both = seen + rest
        assert both[:length] == order.order(0).tolist()[: len(both)]
        assert len(both) > length - after
    else:
        assert rest == order.order(1).tolist()[: len(rest)] and rest


def test_iteration_goes_on_where_it_was_left() -> None:
    data = loader(Ids(10), micro=2)
    assert len(data) == 5
    first = [next(iter(data)), next(iter(data))]
    rest = list(data)
    assert len(rest) == 3 and sorted(flat(first + rest)) == list(range(10))
    assert flat(first + rest) != flat(data)


def test_the_last_batch_leads_to_the_next_epoch() -> None:
    data = loader(Ids(5), micro=2)
    iterator = iter(data)
    next(iterator)
    assert (data.epoch, data.samples) == (0, 2)
    next(iterator)
    assert (data.epoch, data.samples) == (1, 0)
    assert list(iterator) == []
    assert (data.epoch, data.samples) == (1, 0)


def test_batches_are_collated_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        data = ShardedLoader(Ids(6), Sharding(0, 1, 3, seed=0), num_workers=num_workers)
        assert all(isinstance(batch, torch.Tensor) and batch.shape == (3,) for batch in data)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_outdated_iterator_is_refused() -> None:
    data = loader(Ids(8))
    old = iter(data)
    next(old)
    next(iter(data))
    with pytest.raises(RuntimeError, match="outdated"):
        next(old)
    current = data.repeat()
    next(current)
    data.load_state_dict(data.state_dict())
    with pytest.raises(RuntimeError, match="outdated"):
        next(current)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 8}, "seed is 8 but the checkpoint has 7"),
        ({"shuffle": False}, "shuffle is False but the checkpoint has True"),
        ({"dataset": Ids(9)}, "dataset_length is 9 but the checkpoint has 8"),
        ({"dataset": Stream(8)}, "shuffle is False|dataset_length is None"),
    ],
)
def test_a_state_of_another_order_is_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader(**{"dataset": Ids(8), **other}).load_state_dict(loader(Ids(8)).state_dict())


def test_an_incomplete_state_is_refused() -> None:
    data = loader(Ids(8))
    with pytest.raises(ValueError, match="has no 'samples'"):
        data.load_state_dict({name: value for name, value in data.state_dict().items() if name != "samples"})


@pytest.mark.parametrize(
    ("dataset", "options", "error", "words"),
    [
        (iter([1, 2]), {}, TypeError, "list_iterator.*read only once"),
        (3, {}, TypeError, "int.*__iter__"),
        (Stream(4), {"shuffle": True}, ValueError, "shuffle=True needs a dataset with a length; Stream"),
        (Stream(4), {"drop_last": False}, ValueError, "drop_last=False needs a dataset with a length"),
        (Stream(4), {"micro": 0}, ValueError, "micro_batch_size"),
        (Ids(2), {"micro": 3}, ValueError, "2 samples, fewer than one global batch of 3"),
    ],
)
def test_loader_errors_name_the_thing(
    dataset: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        loader(dataset, **options)


def test_short_streams_are_errors_and_not_endless() -> None:
    with pytest.raises(ValueError, match="ended before one global batch of 6 samples"):
        next(loader(Stream(5), 0, 2, 3).repeat())
    shrunk = loader(Stream(5))
    shrunk.load_state_dict({**shrunk.state_dict(), "samples": 6})
    with pytest.raises(ValueError, match="sample 6 of a stream that ends after 5"):
        next(iter(shrunk))
    with pytest.raises(TypeError, match="Stream"):
        len(loader(Stream(5)))


def test_next_batch_goes_on_where_the_loader_is() -> None:
    """Over epochs, after an iterator of somebody else, and after a state was loaded."""
    one, other = loader(Ids(6), micro=2), loader(Ids(6), micro=2)
    expected = list(islice(other.repeat(), 9))
    state = one.state_dict()
    assert [one.next_batch() for _ in range(4)] == expected[:4]
    assert next(iter(one)) == expected[4]
    assert one.next_batch() == expected[5]
    one.load_state_dict(state)
    assert [one.next_batch() for _ in range(9)] == expected


def test_next_batch_survives_an_error_of_the_dataset() -> None:
    class Flaky(Ids):
        fails = True

        def __getitem__(self, index: int) -> int:
            if self.fails:
                self.fails = False
                raise OSError("flaky disk")
            return super().__getitem__(index)

    one, other = loader(Flaky(6), micro=2), loader(Ids(6), micro=2)
    with pytest.raises(OSError, match="flaky disk"):
        one.next_batch()
    assert [one.next_batch() for _ in range(3)] == list(other)
