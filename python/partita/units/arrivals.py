"""Reduced gradients on their way to where the optimizer computes."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from partita.device import kernels
from partita.device.streams import HostCopy, Streams
from partita.units.unit import Unit


class Arrivals:
    """Moves sums over ranks into `Unit.reduced`, on the same device or on the host."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        # To the host: None, or whether to add it to `Unit.reduced` there.
        self._under_way: deque[tuple[Unit, bool | None, HostCopy]] = deque()

    def take(self, unit: Unit, part: Tensor, *, accumulate: bool) -> None:
        """Moves the sum over ranks of the own range of a unit; adds it with `accumulate`."""
        if part.device == unit.reduced.device:
            kernels.cast(unit.reduced, part, accumulate=accumulate)
        elif accumulate or part.dtype != unit.reduced.dtype:
            self._under_way.append((unit, accumulate, self._streams.copy_to_host(part)))
        else:
            self._under_way.append((unit, None, self._streams.copy_into(unit.reduced, part)))

    def wait(self) -> None:
        """What is on its way to the host is there; the host waits."""
        while self._under_way:
            unit, accumulate, copy = self._under_way.popleft()
            values = copy.wait()
            if accumulate is not None:
                kernels.cast(unit.reduced, values, accumulate=accumulate, threads=self._streams.host_threads)
