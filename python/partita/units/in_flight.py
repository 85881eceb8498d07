"""Reductions under way: full buffers of gradients on their way to `Unit.reduced`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.comm import Communicator, Handle
from partita.device import kernels
from partita.device.streams import InOrder, Streams
from partita.units.arrivals import Arrivals
from partita.units.policy import StagePolicy
from partita.units.reduction import ReductionSettings
from partita.units.staging import Staging
from partita.units.unit import GradState, Unit

# On the CPU. Enough that the transport never runs dry. More would not finish sooner, and what they hold for their
# duration would lie between freed gradients and keep malloc from using that memory again.
REDUCTIONS_IN_FLIGHT = 4


@dataclass(frozen=True, eq=False)
class _InFlight:
    """A collective under way; the buffer stays alive and unchanged until it has been waited for."""

    unit: Unit
    handle: Handle
    staging: Tensor | None  # None: the unit's own full buffer


class Reductions:
    """Reduces full buffers of units over the data-parallel ranks, and brings the sums to `Unit.reduced`.

    Sums that leave the device do so on the stream of copies to the host: that stream waits for the collective in the
    place of the one on which backward goes on.

    Args:
        units: all that are reduced.
        order: of all work on these buffers, but for copies to the host.
    """

    def __init__(
        self,
        communicator: Communicator,
        policy: StagePolicy,
        settings: ReductionSettings,
        streams: Streams,
        units: Sequence[Unit],
        order: InOrder,
    ) -> None:
        self._communicator = communicator
        self._policy = policy
        self._settings = settings
        self._streams = streams
        self._order = order
        self._in_flight: deque[_InFlight] = deque()
        self._arrivals = Arrivals(streams, units)
        self._staging = Staging(communicator, max((unit.layout.numel for unit in units), default=0))

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._in_flight)

    @property
    def staging_bytes(self) -> int:
        """Of buffers that gradients of several units use in turns."""
        return self._staging.nbytes

    @property
    def landing_bytes(self) -> int:
        """The same on the host, of sums that are added there."""
        return self._arrivals.landing_bytes

    def has(self, unit: Unit) -> bool:
        """Whether one of this unit is under way."""
        return any(flight.unit is unit for flight in self._in_flight)

    def start_local(self, unit: Unit, full_grads: Tensor) -> None:
        """Reduces what was summed on this rank in the unit's own full buffer."""
        dtype = self._communication_dtype(unit)
        if dtype == full_grads.dtype:
            self._start(unit, full_grads, staging=None)
        else:
            staging = self._take_staging(dtype)
            kernels.cast(staging[: unit.layout.numel], full_grads)
            self._start(unit, staging[: unit.layout.numel], staging)

    def start_staged(self, unit: Unit, fill: Callable[[Tensor], None]) -> None:
        """Reduces what `fill` writes into a full buffer that the unit has for so long."""
        staging = self._take_staging(self._communication_dtype(unit))
        fill(staging[: unit.layout.numel])
        self._start(unit, staging[: unit.layout.numel], staging)

    def wait(self) -> None:
        """None is under way any more, and the sums are where the optimizer computes."""
        self.finish()
        self.wait_for_host()

    def wait_for_host(self) -> None:
        """What is on its way to the host is there."""
        self._arrivals.wait()

    def finish(self) -> None:
        """None is under way any more; sums may be on their way to the host."""
        while self._in_flight:
            self._complete_oldest()

    def _communication_dtype(self, unit: Unit) -> torch.dtype:
        return self._settings.communication_dtype or unit.reduced.dtype

    def _start(self, unit: Unit, buffer: Tensor, staging: Tensor | None) -> None:
        while not self._streams.is_asynchronous and len(self._in_flight) >= REDUCTIONS_IN_FLIGHT:
            self._complete_oldest()
        if self._policy.reduce_scatter:
            handle = self._communicator.reduce_scatter(buffer)
        else:
            handle = self._communicator.all_reduce(buffer)
        flight = _InFlight(unit, handle, staging)
        self._in_flight.append(flight)
        if not self._settings.overlap:
            self.finish()
        elif self._arrivals.leaves(unit):
            with self._streams.to_host():
                self._complete(flight)

    def _take_staging(self, dtype: torch.dtype) -> Tensor:
        while (buffer := self._staging.take(dtype)) is None:
            self._complete_oldest()
        return buffer

    def _complete_oldest(self) -> None:
        self._order.enter()
        self._complete(self._in_flight[0])

    def _complete(self, flight: _InFlight) -> None:
        flight.handle.wait()  # if this raises, the collective stays under way: it was not completed
        self._in_flight.remove(flight)
        unit, copy = flight.unit, None
        full = unit.full_grads if flight.staging is None else flight.staging[: unit.layout.numel]
        if full is not None and (flight.staging is not None or unit.offloads):
            copy = self._arrivals.take(unit, unit.part(full), accumulate=unit.grad_state is GradState.REDUCED)
        if flight.staging is not None:
            self._staging.give_back(flight.staging, copy)
        # A full buffer of the unit's own is written again when the host has waited for the copy: in the next step.
        unit.grad_state = GradState.REDUCED
