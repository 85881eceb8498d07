"""Which samples each rank sees: pure arithmetic, no processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sharding:
    """Which part of the samples a rank sees.

    Args:
        rank, world_size: in the data-parallel group.
        micro_batch_size: samples in a batch of one rank.
        seed: of the order, at least 0; the same on all ranks.

    Raises:
        ValueError: an argument out of range; names it.
    """

    rank: int
    world_size: int
    micro_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, low in (("world_size", 1), ("rank", 0), ("micro_batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size ({self.world_size}), got {self.rank}")

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks consume together in one batch."""
        return self.world_size * self.micro_batch_size

    @property
    def in_words(self) -> str:
        """Where the size of a global batch comes from, for an error."""
        return f"{self.world_size} ranks x train_micro_batch_size_per_gpu {self.micro_batch_size}"


@dataclass(frozen=True)
class ShardedSampler:
    """Cuts one order of the dataset, the same on all ranks, into global batches and gives each rank its part.

    A global batch is ``world_size * micro_batch_size`` consecutive samples of the order; rank ``r`` takes every
    ``world_size``-th of them, from the ``r``-th on. So the order of samples over the whole job depends on ``seed`` and
    the epoch only, and every rank has the same number of batches. The sampler has no position: ``start`` is given in
    samples of the order that all ranks have consumed together, and may come from a run with another world size or
    batch size.

    Args:
        length: samples in the dataset.
        sharding: the part of this rank.
        shuffle: a new permutation for each epoch; otherwise 0, 1, 2, ...
        drop_last: True drops the samples that do not fill a global batch. False fills it by going on from the start of
            the epoch's order, so that some samples are seen twice in the epoch.

    Raises:
        ValueError: an empty dataset, or with ``drop_last`` one smaller than a global batch.
    """

    length: int
    sharding: Sharding
    _: KW_ONLY
    shuffle: bool
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"the dataset must have at least one sample, got length {self.length}")
        if self.drop_last and self.length < self.global_batch_size:
            raise ValueError(
                f"the dataset has {self.length} samples, fewer than one global batch of {self.global_batch_size} "
                f"({self.sharding.in_words}); lower train_micro_batch_size_per_gpu (or train_batch_size) in the "
                "config, or give a DataLoader with drop_last=False, which repeats samples"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks consume together in one batch."""
        return self.sharding.global_batch_size

    def num_batches(self, start: int = 0) -> int:
        """Batches of each rank from sample ``start`` of an epoch to its end."""
        rest = max(0, self.length - start)
        return rest // self.global_batch_size if self.drop_last else -(-rest // self.global_batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample ids of a whole epoch, ``[length]``, a function of seed and epoch alone."""
        if not self.shuffle:
            return np.arange(self.length)
        # RandomState, not Generator: NumPy keeps its stream frozen (NEP 19), so a checkpoint outlives upgrades.
        bits = np.random.MT19937(np.random.SeedSequence([self.sharding.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.length)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """This rank's batches of sample ids, ``micro_batch_size`` each, from sample ``start`` of the epoch's order."""
        order = self.order(epoch)
        for batch in range(self.num_batches(start)):
            first = start + batch * self.global_batch_size
            positions = range(first + self.sharding.rank, first + self.global_batch_size, self.sharding.world_size)
            yield order.take(positions, mode="wrap").tolist()
