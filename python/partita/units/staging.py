"""Full gradient buffers that units take turns to use."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.comm import Communicator

STAGING_BUFFERS = 2


class Staging:
    """Full gradient buffers for units that have none of their own, two per dtype, allocated when first needed."""

    def __init__(self, communicator: Communicator, numel: int) -> None:
        self._communicator = communicator
        self._numel = numel
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def take(self, dtype: torch.dtype) -> Tensor | None:
        """A free buffer; None while both are in use."""
        if dtype not in self._free:
            self._free[dtype] = [self._communicator.empty(self._numel, dtype) for _ in range(STAGING_BUFFERS)]
        return self._free[dtype].pop() if self._free[dtype] else None

    @property
    def nbytes(self) -> int:
        """Of all buffers, free or not."""
        return sum(STAGING_BUFFERS * self._numel * dtype.itemsize for dtype in self._free)

    def give_back(self, buffer: Tensor) -> None:
        """Nobody uses the buffer any more."""
        self._free[buffer.dtype].append(buffer)
