"""Full gradient buffers that units take turns to use."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.comm import Communicator
from partita.device.streams import HostCopy

STAGING_BUFFERS = 2


class Staging:
    """Full gradient buffers for units that have none of their own, two per dtype, allocated when first needed."""

    def __init__(self, communicator: Communicator, numel: int) -> None:
        self._communicator = communicator
        self._numel = numel
        # Free ones, the last one used last; with the copy that still reads it.
        self._free: dict[torch.dtype, list[tuple[Tensor, HostCopy | None]]] = {}

    def take(self, dtype: torch.dtype) -> Tensor | None:
        """A buffer that what is queued from now on may write; None while both are in use."""
        if dtype not in self._free:
            self._free[dtype] = [(self._communicator.empty(self._numel, dtype), None) for _ in range(STAGING_BUFFERS)]
        free = self._free[dtype]
        if not free:
            return None
        # The last one is in the caches of a CPU. Where copies leave the device, the first one is read no more, soonest.
        buffer, copy = free.pop() if free[-1][1] is None else free.pop(0)
        if copy is not None:
            copy.come_after()
        return buffer

    @property
    def nbytes(self) -> int:
        """Of all buffers, free or not."""
        return sum(STAGING_BUFFERS * self._numel * dtype.itemsize for dtype in self._free)

    def give_back(self, buffer: Tensor, copy: HostCopy | None = None) -> None:
        """Nobody uses the buffer any more, but for a copy that reads it."""
        self._free[buffer.dtype].append((buffer, copy))
