"""A loader that begins again when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class RepeatingLoader:
    """An iterator over a loader's batches that never ends: after the last batch comes the first of the next epoch.

    Args:
        loader: a DataLoader, or anything whose `__iter__` begins from its start.

    Raises:
        TypeError: the loader cannot be iterated.
        ValueError: an epoch has no batches, as when the loader can be read only once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __len__(self) -> int:
        """Batches of one epoch, where the loader knows."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for batch in self.data_iter:
            return batch
        self.data_iter = iter(self.loader)
        for batch in self.data_iter:
            return batch
        name = type(self.loader).__name__
        raise ValueError(f"RepeatingLoader: an epoch of the {name} has no batches: empty, or read only once")
