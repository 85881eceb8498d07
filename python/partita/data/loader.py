"""A data loader that knows where it is: what it has handed out survives a restart, sample for sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from partita.data.sampler import ShardedSampler, Sharding
from partita.device import HOST


class ShardedLoader:
    """Batches of this rank, over a dataset with a length or over a stream, resumable at any batch.

    Each ``iter(loader)`` gives the rest of the current epoch; the next one starts the next epoch, in a new order. Only
    the newest iterator may be used. ``repeat()`` goes on over epochs without end. ``next_batch()`` gives one batch at a
    time from wherever the loader is, also after a state was loaded.

    A dataset with ``__len__`` and ``__getitem__`` is sharded by ``ShardedSampler``. Anything else that can be iterated
    is a stream: not shuffled, rank ``r`` takes every ``world_size``-th sample, and an incomplete last global batch
    is dropped, so that every rank has the same number of batches. Every rank and every worker reads the whole stream,
    so it must not shard itself; a resumed stream reads and skips what was consumed.

    Sample ids are exactly those of an unbroken run. Random transforms inside the dataset are only if they are seeded by
    the sample: a worker's random state restarts with each ``iter(loader)``.

    Args:
        dataset: map-style or a stream.
        sharding: the part of this rank.
        collate_fn: a list of samples to a batch; None is torch's ``default_collate``.
        num_workers: processes that load ahead; 0 loads in this one. What they prefetched does not count as consumed.
        shuffle: None shuffles a dataset with a length and leaves a stream as it is.
        drop_last: as in ``ShardedSampler``; a stream cannot have False.
        options: further arguments for torch's ``DataLoader``: ``pin_memory``, ``worker_init_fn``, ...

    Raises:
        ValueError: an argument out of range; a dataset, or a whole epoch of a stream, smaller than one global batch.
        TypeError: the dataset is a one-shot iterator, or cannot be iterated at all.
        RuntimeError: an iterator is used after a newer one began or a state was loaded.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Iterable[Any],
        sharding: Sharding,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        shuffle: bool | None = None,
        drop_last: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.sharding = sharding
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.num_workers = num_workers
        self.options = dict(options or {})
        self.sampler: ShardedSampler | None = None  # None for a stream
        self.epoch = 0
        self.samples = 0  # of this epoch's order, consumed by all ranks together
        self._iteration = 0  # counts iterators, so that an outdated one is noticed
        self._batches_on: Iterator[Any] = iter(())  # of `next_batch`
        self._iteration_on = -1  # the one that `_batches_on` belongs to
        if _has_length(dataset):
            self.sampler = ShardedSampler(
                len(dataset),  # type: ignore[arg-type]
                sharding,
                shuffle=shuffle is not False,
                drop_last=drop_last,
            )
        else:
            _check_stream(dataset, shuffle, drop_last)

    def __len__(self) -> int:
        """Batches of a whole epoch; TypeError for a stream, which has no length."""
        if self.sampler is None:
            raise TypeError(f"a stream ({type(self.dataset).__name__}) has no number of batches")
        return self.sampler.num_batches()

    def __iter__(self) -> Iterator[Any]:
        self._iteration += 1
        return self._rest_of_epoch(self._iteration)

    def repeat(self) -> Iterator[Any]:
        """The rest of this epoch, then all epochs after it, without end."""
        while True:
            yield from self

    def next_batch(self) -> Any:
        """The batch after the one that was handed out last, over all epochs."""
        if self._iteration_on != self._iteration:
            self._batches_on = self.repeat()
        self._iteration_on = -1  # an error of the dataset ends the iterator, and not this loader
        batch = next(self._batches_on)
        self._iteration_on = self._iteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out so far, the same on every rank; JSON types only."""
        return {"epoch": self.epoch, "samples": self.samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        The position is in samples, so world size and micro-batch size may differ from the run that saved it: the next
        global batch starts at the first sample not yet consumed, whatever its size.

        Raises:
            ValueError: a key is missing, or seed, shuffle or dataset length differ, so that the order would be another.
        """
        missing = {"epoch", "samples", *self._identity()} - state.keys()
        if missing:
            raise ValueError(f"the data loader's state has no {sorted(missing)[0]!r}")
        for name, here in self._identity().items():
            if state[name] != here:
                raise ValueError(
                    f"the data loader's {name} is {here!r} but the checkpoint has {state[name]!r}, which is another "
                    f"order of samples; use the same {name}, or leave the loader's state out to start anew"
                )
        self._iteration += 1
        self.epoch, self.samples = state["epoch"], state["samples"]

    def _identity(self) -> dict[str, Any]:
        """What decides the order of samples."""
        sampler = self.sampler
        return {
            "seed": self.sharding.seed,
            "shuffle": sampler is not None and sampler.shuffle,
            "dataset_length": None if sampler is None else sampler.length,
        }

    def _rest_of_epoch(self, iteration: int) -> Iterator[Any]:
        """Hands out batches; a rest without any, as after a stream's last batch, goes over to the next epoch."""
        while True:
            self._check_newest(iteration)
            fresh, count = self.samples == 0, 0
            epoch = self.epoch
            for batch in self._batches():
                self._check_newest(iteration)
                count += 1
                self.samples += self.sharding.global_batch_size
                # The last batch leads to the next epoch as it is handed out: a state saved after it resumes there.
                if self.sampler is not None and self.sampler.num_batches(self.samples) == 0:
                    self._next_epoch()
                yield batch
            if self.epoch == epoch:
                self._check_newest(iteration)
                self._next_epoch()
            if count:
                return
            if fresh:
                raise ValueError(
                    f"the stream ended before one global batch of {self.sharding.global_batch_size} samples "
                    f"({self.sharding.in_words}); give more samples, or lower train_micro_batch_size_per_gpu"
                )

    def _check_newest(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError("this iterator is outdated: a newer one of the same loader began, or a state was loaded")

    def _next_epoch(self) -> None:
        self.epoch, self.samples = self.epoch + 1, 0

    def _batches(self) -> Iterator[Any]:
        # A generator of its own: torch would draw the workers' seed from the global one, which the model uses too.
        place = [self.sharding.seed, self.epoch, self.samples, self.sharding.rank]
        words = np.random.SeedSequence(place).generate_state(1)
        common: dict[str, Any] = {
            "collate_fn": self.collate_fn,
            "num_workers": self.num_workers,
            **self.options,
            "generator": torch.Generator(HOST).manual_seed(int(words[0])),
        }
        if self.sampler is not None:
            batches = self.sampler.batches(self.epoch, self.samples)
            loader = DataLoader(self.dataset, batch_sampler=batches, **common)  # type: ignore[arg-type]
        else:
            shard = _StreamShard(self.dataset, self.sharding, self.samples)
            loader = DataLoader(shard, batch_size=None, **common)
        with torch.device(HOST):  # torch draws a number from the generator here, on the program's default device
            return iter(loader)


class _StreamShard(IterableDataset[list[Any]]):
    """This rank's batches of a stream as lists of samples, from sample ``start`` on.

    With workers, worker ``w`` of ``n`` gives every ``n``-th batch; torch asks the workers in turn, which restores the
    order.
    """

    def __init__(self, stream: Any, sharding: Sharding, start: int) -> None:
        self.stream, self.sharding, self.start = stream, sharding, start

    def __iter__(self) -> Iterator[list[Any]]:
        samples = iter(self.stream)
        skipped = sum(1 for _ in islice(samples, self.start))
        if skipped < self.start:
            raise ValueError(f"cannot resume at sample {self.start} of a stream that ends after {skipped}")
        worker = get_worker_info()
        mine, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        turn = 0
        # The whole global batch is read before this rank's part is given, so that no rank gets a batch others lack.
        size = self.sharding.global_batch_size
        while len(batch := list(islice(samples, size))) == size:
            if turn % turns == mine:
                yield batch[self.sharding.rank :: self.sharding.world_size]
            turn += 1


def _has_length(dataset: object) -> bool:
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _check_stream(dataset: object, shuffle: bool | None, drop_last: bool) -> None:
    name = type(dataset).__name__
    if isinstance(dataset, Iterator):
        raise TypeError(
            f"the dataset ({name}) is an iterator, which can be read only once; "
            "give an object whose __iter__ starts the stream from its beginning"
        )
    if not hasattr(dataset, "__iter__"):
        raise TypeError(f"the dataset ({name}) has neither __len__ and __getitem__ nor __iter__")
    if shuffle:
        raise ValueError(f"shuffle=True needs a dataset with a length; {name} is a stream")
    if not drop_last:
        raise ValueError(f"drop_last=False needs a dataset with a length; {name} is a stream")
