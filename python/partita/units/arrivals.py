"""Reduced gradients on their way to where the optimizer computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.device import kernels
from partita.device.memory import host_buffer
from partita.device.streams import HostCopy, Streams
from partita.units.unit import Unit

# As many sums may be on their way to be added on the host. The host waits for the oldest one before it sends another,
# and is ahead of the device by more units than the device has buffers for.
LANDINGS = 4


@dataclass(frozen=True)
class _Arriving:
    """A sum that is on its way to the host."""

    unit: Unit
    copy: HostCopy
    landing: Tensor | None  # where it arrives; None: in `Unit.reduced` itself
    accumulate: bool


class Arrivals:
    """Moves sums over ranks into `Unit.reduced`, on the same device or on the host.

    Args:
        units: whose sums these are.
    """

    def __init__(self, streams: Streams, units: Sequence[Unit]) -> None:
        self._streams = streams
        self._under_way: deque[_Arriving] = deque()
        self._numel = max((len(unit.own) for unit in units if unit.offloads), default=0)
        self._free: dict[torch.dtype, list[Tensor]] = {}  # landings on the host
        self._landings: dict[torch.dtype, int] = {}  # how many there are

    @property
    def landing_bytes(self) -> int:
        """Memory on the host that sums of several units use in turns."""
        return sum(count * self._numel * dtype.itemsize for dtype, count in self._landings.items())

    def leaves(self, unit: Unit) -> bool:
        """Whether the sums of a unit leave the device."""
        return unit.offloads and self._streams.is_asynchronous

    def take(self, unit: Unit, part: Tensor, *, accumulate: bool) -> HostCopy | None:
        """Moves the sum over ranks of the own range of a unit; adds it with `accumulate`.

        Returns the copy that reads `part`, if that is not work of the current stream.
        """
        if not self.leaves(unit):
            kernels.cast(unit.reduced, part, accumulate=accumulate)
            return None
        landing = None
        if accumulate or part.dtype != unit.reduced.dtype:
            landing = self._take_landing(part.dtype, unit.pins)
        destination = unit.reduced if landing is None else landing[: part.numel()]
        copy = self._streams.copy_into(destination, part)
        self._under_way.append(_Arriving(unit, copy, landing, accumulate))
        return copy

    def wait(self) -> None:
        """What is on its way to the host is there; the host waits."""
        while self._under_way:
            self._complete_oldest()

    def _complete_oldest(self) -> None:
        arriving = self._under_way[0]
        values = arriving.copy.wait()  # if this raises, the copy stays under way: its memory is not free
        self._under_way.popleft()
        if arriving.landing is not None:
            kernels.cast(
                arriving.unit.reduced, values, accumulate=arriving.accumulate, threads=self._streams.host_threads
            )
            self._free[arriving.landing.dtype].append(arriving.landing)

    def _take_landing(self, dtype: torch.dtype, pins: bool) -> Tensor:
        free = self._free.setdefault(dtype, [])
        count = self._landings.get(dtype, 0)
        while not free and count >= LANDINGS:
            self._complete_oldest()
        if free:
            return free.pop()
        self._landings[dtype] = count + 1
        return host_buffer(self._numel, dtype, pins)
