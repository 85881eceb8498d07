"""A backward in two halves: the gradients of a module's inputs first (I), those of its weights later (W)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


class Deferred:
    """The weight gradients that one backward has left."""

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Computes them, one after the other."""
        yield from ()


class WeightSplit:
    """Defers weight gradients of a stage: none yet, so that all are computed in I."""

    def __init__(self, module: nn.Module, exits: ExitStack) -> None:
        self._module = module

    @contextmanager
    def collecting(self) -> Iterator[Deferred]:
        """A backward in the block leaves what can wait."""
        yield Deferred()
