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
    """

    is_asynchronous = True

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.stream: Any = "main"
        self.copies = 0
        self.known: defaultdict[Any, set[int]] = defaultdict(set)

    def current(self) -> Any:
        return self.stream

    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        self.events.append(("come after", stream, [t.data_ptr() for t in tensors]))
        self.known[self.stream] |= self.known[stream]

    def copy_to_host(self, tensor: Tensor) -> _LateCopy:
        self.copies += 1
        self.events.append(("copy", self.copies))
        return _LateCopy(self, self.copies, tensor.clone())

    def copy_into(self, destination: Tensor, source: Tensor) -> _LateCopy:
        """The bytes that the source has now; until somebody waits, the destination has garbage."""
        self.copies += 1
        self.events.append(("copy", self.copies))
        then = source.clone()
        destination.fill_(float("nan"))
        return _LateCopy(self, self.copies, then, destination)

    def waits(self) -> list[int]:
        """The copies that were waited for since the last call; forgets all events."""
        numbers = [event[1] for event in self.events if event[0] == "wait"]
        self.events.clear()
        return numbers


class _LateCopy:
    def __init__(
        self, streams: LateStreams, number: int, bytes_then: Tensor, destination: Tensor | None = None
    ) -> None:
        self._streams, self._number, self._bytes, self._destination = streams, number, bytes_then, destination

    def wait(self) -> Tensor:
        self._streams.events.append(("wait", self._number))
        if self._destination is None:
            return self._bytes
        return self._destination.copy_(self._bytes)


@contextmanager
def on_late_streams(streams: LateStreams | None = None) -> Iterator[LateStreams]:
    """Engines made in this block believe that their device works by itself."""
    streams = streams or LateStreams()
    with inside.with_streams(streams):
        yield streams
