"""The CPU seen as a GPU is: the host learns the outcome of a step later, and work comes from several streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import inside
from partita.device.streams import HostStreams
from torch import Tensor


class LateStreams(HostStreams):
    """Keeps a list of what happened: ("copy" or "wait", number of the copy), and what a test adds.

    `stream` is the current one; a test changes it. `known[s]`: numbers that a test gives to the work that comes before
    all that is queued on stream s from now on.

    Marks and copies are queued. The device has done what was queued before a copy once somebody has waited for the
    copy, or all of it after `catch_up()`. The time of a mark that it has not reached cannot be asked for.
    """

    is_asynchronous = True

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.stream: Any = "main"
        self.copies = 0
        self.known: defaultdict[Any, set[int]] = defaultdict(set)
        self._queued = self._done = 0

    def current(self) -> Any:
        return self.stream

    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        self.events.append(("come after", stream, [t.data_ptr() for t in tensors]))
        self.known[self.stream] |= self.known[stream]

    def copy_to_host(self, tensor: Tensor) -> LateCopy:
        return self._copy(tensor)

    def copy_into(self, destination: Tensor, source: Tensor) -> LateCopy:
        """The bytes that the source has now; until somebody waits, the destination has garbage."""
        copy = self._copy(source, destination)
        destination.fill_(float("nan"))
        return copy

    def _copy(self, source: Tensor, destination: Tensor | None = None) -> LateCopy:
        self.copies += 1
        self._queued += 1
        self.events.append(("copy", self.copies))
        return LateCopy(self, (self.copies, self._queued), source.clone(), destination)

    def mark(self) -> Any:
        self._queued += 1
        return self._queued, super().mark()

    def is_reached(self, mark: Any) -> bool:
        return bool(mark[0] <= self._done)

    def milliseconds(self, start: Any, end: Any) -> float:
        assert self.is_reached(start) and self.is_reached(end), "a time was asked for that the device has not come to"
        return super().milliseconds(start[1], end[1])

    def catch_up(self) -> None:
        """The device has done all that is queued."""
        self._done = self._queued

    def has_done(self, place: int) -> None:
        """The device has done what is queued up to here."""
        self._done = max(self._done, place)

    def waits(self) -> list[int]:
        """The copies that were waited for since the last call; forgets all events."""
        numbers = [event[1] for event in self.events if event[0] == "wait"]
        self.events.clear()
        return numbers


class LateCopy:
    def __init__(
        self, streams: LateStreams, place: tuple[int, int], bytes_then: Tensor, destination: Tensor | None = None
    ) -> None:
        self._streams, self._bytes, self._destination = streams, bytes_then, destination
        self._number, self._place = place

    def wait(self) -> Tensor:
        self._streams.events.append(("wait", self._number))
        self._streams.has_done(self._place)
        if self._destination is None:
            return self._bytes
        return self._destination.copy_(self._bytes)


@contextmanager
def on_late_streams(streams: LateStreams | None = None) -> Iterator[LateStreams]:
    """Engines made in this block believe that their device works by itself."""
    streams = streams or LateStreams()
    with inside.with_streams(streams):
        yield streams
