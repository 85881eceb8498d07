"""What a program gives as training data: a data set, or a DataLoader of torch, which says how to load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from partita.comm import ranks_that_differ
from partita.data.loader import ShardedLoader
from partita.data.sampler import Sharding
from partita.run import Run

Collate = Callable[[list[Any]], Any]

# Arguments of a DataLoader that are kept. `persistent_workers` is not: each epoch starts its workers.
KEPT = ("pin_memory", "pin_memory_device", "timeout", "worker_init_fn", "prefetch_factor", "multiprocessing_context")


@dataclass(frozen=True)
class Loading:
    """A data set, and what a program has said about loading it; None: nothing.

    batch_size: samples of a micro-batch. seed: of the order. replica: (rank, ranks) that a DistributedSampler is for.
    options: further arguments for torch's DataLoader.
    """

    dataset: Any
    collate_fn: Collate | None
    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool = True
    seed: int | None = None
    replica: tuple[int, int] | None = None
    num_workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def check_replica(self, rank: int, world_size: int) -> None:
        """Raises ValueError if the data's DistributedSampler is for another rank or number of ranks."""
        if self.replica not in (None, (rank, world_size)):
            its_rank, its_ranks = self.replica or (0, 0)
            raise ValueError(
                f"training_data has a DistributedSampler for rank {its_rank} of {its_ranks}, and this is rank {rank} "
                f"of {world_size}: leave the sampler out, as initialize() gives each rank its part"
            )


def loading_of(data: Any, collate_fn: Collate | None) -> Loading:
    """Takes a DataLoader apart; any other data are a data set.

    The loader's batch size is that of a micro-batch. Its order becomes one that all ranks share and that can be
    resumed: shuffled where the loader shuffles, by the seed of its generator or DistributedSampler if it has one, anew
    in each epoch without `set_epoch()`. With `drop_last=False` the last batch is filled up from the start of the epoch;
    of a stream it is dropped.

    Raises:
        ValueError: the loader has a sampler that cannot be shared between ranks, does not make batches, or has another
            collate function than the one that is given.
    """
    if not isinstance(data, DataLoader):
        return Loading(data, collate_fn)
    batches = data.batch_sampler
    if type(batches) is not BatchSampler:
        what = "makes no batches (batch_size=None)" if batches is None else f"has a {type(batches).__name__}"
        raise ValueError(f"training_data: the DataLoader {what}, which cannot be divided over ranks; {_WAY_OUT}")
    if collate_fn is not None and data.collate_fn not in (collate_fn, default_collate):
        raise ValueError("collate_fn: the DataLoader in training_data has another one; give one of them")
    is_stream = isinstance(data.dataset, IterableDataset)
    dataset, order = (data.dataset, {}) if is_stream else _order_of(data.dataset, batches.sampler)
    return Loading(
        dataset,
        data.collate_fn if collate_fn is None else collate_fn,
        batch_size=batches.batch_size,
        drop_last=is_stream or batches.drop_last,
        num_workers=data.num_workers,
        options={name: getattr(data, name) for name in KEPT},
        **order,
    )


_WAY_OUT = (
    "give the data set itself, or train with a loader of each rank's own: engine.train_batch(loader), or a loop of "
    "engine(batch), engine.backward(loss) and engine.step()"
)


def _order_of(dataset: Any, sampler: Any) -> tuple[Any, dict[str, Any]]:
    """The samples that a sampler chooses, and fields of `Loading` for their order."""
    kind = type(sampler)
    if kind is SequentialSampler:
        return dataset, {"shuffle": False}
    if kind is DistributedSampler:
        replica = (sampler.rank, sampler.num_replicas)
        return dataset, {"shuffle": sampler.shuffle, "seed": sampler.seed, "replica": replica}
    seed = None if getattr(sampler, "generator", None) is None else sampler.generator.initial_seed()
    if kind is SubsetRandomSampler:
        return Subset(dataset, sampler.indices), {"shuffle": True, "seed": seed}
    if kind is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        return dataset, {"shuffle": True, "seed": seed}
    what = "a RandomSampler with replacement or num_samples" if kind is RandomSampler else f"a {kind.__name__}"
    raise ValueError(f"training_data: the DataLoader has {what}, whose order ranks cannot share; {_WAY_OUT}")


def sharded_loader(loading: Loading, run: Run) -> ShardedLoader:
    """This rank's part of the training data. A collective.

    Raises:
        ValueError: ranks have different data or orders, or a data set is too small, see `ShardedLoader`.
    """
    data = run.grid.data
    loading.check_replica(data.rank, data.world_size)
    seed = run.config.seed if loading.seed is None else loading.seed
    loader = ShardedLoader(
        loading.dataset,
        Sharding(data.rank, data.world_size, run.batch.micro, seed),
        collate_fn=loading.collate_fn,
        num_workers=loading.num_workers,
        shuffle=loading.shuffle,
        drop_last=loading.drop_last,
        options=loading.options,
    )
    order = loader.state_dict()
    if others := ranks_that_differ(data, repr(order).encode()):
        raise ValueError(
            f"training_data: ranks {others} have data of another length or order than rank 0 (this rank: {order}); "
            "give all ranks the same data set and the same seed"
        )
    return loader
