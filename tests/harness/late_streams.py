"""The CPU seen as a GPU is: the host learns of work later, copies happen late, and work comes from several streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import inside
import torch
from communicators import Wrapped
from partita.comm import Communicator, Handle
from partita.device import HostStreams
from partita.device.streams import Moment
from torch import Tensor

TO_HOST, TO_DEVICE = "copies to the host", "copies to the device"


class LateStreams(HostStreams):
    """Work of the device is done when it is queued; copies between it and the host are done as late as may be.

    A copy is done when something comes that has been ordered after it: work of a stream that called `come_after()`, or
    the host that waits. It reads its source then, whatever is there by then. Until then its destination is garbage, and
    memory of the host stays garbage until the host itself waits. So these show as other numbers: a source that the
    device writes too early, a destination that either side reads too early. A source on the host must stay as it is
    until the host has waited; `check()` raises where it did not. A stream that comes after a copy has its number with a
    minus sign in `known`.

    `events`: what happened, ("copy" or "wait", number of the copy), ("come after", stream, addresses), and what a test
    adds. `stream` is the current one; a test changes it. `known[s]`: numbers that a test gives to the work that comes
    before all that is queued on stream s from now on.

    Marks and copies are queued. The device has done what was queued before a copy once somebody has waited for the
    copy, or all of it after `catch_up()`. The time of a mark that it has not reached cannot be asked for.

    Args:
        late: otherwise copies to the host read their source when they begin, as early as may be.
    """

    is_asynchronous = True

    def __init__(self, *, late: bool = True) -> None:
        super().__init__()
        self.events: list[tuple[Any, ...]] = []
        self.stream: Any = "main"
        self.copies = 0
        self.known: defaultdict[Any, set[int]] = defaultdict(set)
        self._late = late
        self.hears_of_launches = False  # a `TellingCommunicator` tells of them
        self._under_way: list[LateCopy] = []  # what the host does not know to be done, in their order
        self._queued = self._done = 0

    # -- streams

    def current(self) -> Any:
        return self.stream

    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        self.events.append(("come after", stream, [t.data_ptr() for t in tensors]))
        self.known[self.stream] |= self.known[stream]

    def hold_back(self, stream: Any, others: Iterable[Any]) -> None:
        for other in others:
            self.known[stream] |= self.known[other]

    def moment(self) -> Moment:
        return _LateMoment(self)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """In this block work is queued on another stream, in no order with any."""
        outside, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = outside

    def to_host(self) -> Any:
        return self._behind(TO_HOST)

    def to_device(self) -> Any:
        return self._behind(TO_DEVICE)

    @contextmanager
    def _behind(self, stream: str) -> Iterator[None]:
        self.known[stream] |= self.known[self.stream]
        with self.on(stream):
            yield

    # -- copies

    def copy_to_host(self, tensor: Tensor) -> Snapshot:
        return Snapshot(self, self._begin(), tensor.clone())

    def copy_into(self, destination: Tensor, source: Tensor) -> LateCopy:
        copy = LateCopy(self, self._begin(), destination, source, TO_HOST)
        self._under_way.append(copy)
        if not self._late:
            copy.read()
        return copy

    def bring(self, destination: Tensor, source: Tensor) -> LateCopy:
        self.check()
        copy = LateCopy(self, self._begin(), destination, source, TO_DEVICE)
        self._under_way.append(copy)
        if not self.hears_of_launches:
            self.goes_on()
        return copy

    def goes_on(self) -> None:
        """Something is queued on the current stream: its own copies are done before that."""
        for copy in self._under_way:
            if copy.stream == self.stream:
                copy.read()

    def _begin(self) -> tuple[int, int]:
        self.copies += 1
        self._queued += 1
        self.events.append(("copy", self.copies))
        return self.copies, self._queued

    def settle(self, last: LateCopy, *, host: bool) -> None:
        """A copy is done, and with it those that came before it on its stream; `host`: which the host knows."""
        before = [copy for copy in self._under_way if copy.stream == last.stream and copy.number <= last.number]
        for copy in before:
            copy.read()
        if host:
            for copy in before:
                self._under_way.remove(copy)
                copy.end()
            for copy in self._under_way:
                copy.spoil()  # the device may be ahead, and write where later ones go

    def check(self) -> None:
        """Raises AssertionError if the host has written into what a copy may still read."""
        for copy in self._under_way:
            copy.check()

    def waits(self) -> list[int]:
        """The copies that were waited for since the last call; forgets all events."""
        numbers = [event[1] for event in self.events if event[0] == "wait"]
        self.events.clear()
        return numbers

    # -- marks

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


class TellingCommunicator(Wrapped):
    """Collectives are work of the stream that is current when they are launched."""

    def __init__(self, inner: Communicator, streams: LateStreams) -> None:
        super().__init__(inner)
        self._streams = streams
        streams.hears_of_launches = True

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        if self.world_size > 1:
            self._streams.goes_on()
        return collective()


class _LateMoment:
    def __init__(self, streams: LateStreams) -> None:
        self._streams = streams
        self._known: set[int] = set()

    def take(self) -> None:
        self._known = set(self._streams.known[self._streams.stream])

    def come_after(self) -> None:
        self._streams.known[self._streams.stream] |= self._known


class Snapshot:
    """A copy on the current stream, of what is there when it is queued."""

    def __init__(self, streams: LateStreams, place: tuple[int, int], values: Tensor) -> None:
        self._streams, self._values = streams, values
        self.number, self._place = place

    def wait(self) -> Tensor:
        self._streams.events.append(("wait", self.number))
        self._streams.has_done(self._place)
        return self._values

    def come_after(self) -> None:
        """It was done when it was queued."""


class LateCopy:
    def __init__(
        self, streams: LateStreams, place: tuple[int, int], destination: Tensor, source: Tensor, stream: str
    ) -> None:
        assert destination.dtype == source.dtype and destination.shape == source.shape
        self._streams, self.stream = streams, stream
        self.number, self._place = place
        self._destination, self._source = destination, source
        self._values: Tensor | None = None  # None: not read yet
        self._is_over = False
        destination.fill_(float("nan"))

    def spoil(self) -> None:
        """What is there on the host is of no use any more."""
        if self.stream == TO_HOST:
            self._destination.fill_(float("nan"))

    def read(self) -> None:
        """The device has made the copy. What it wrote on the host is seen by who waits there."""
        if self._values is None:
            self._values = self._source.clone()
            if self.stream == TO_DEVICE:
                assert self._destination.untyped_storage().nbytes(), "memory went before a copy into it was done"
                self._destination.copy_(self._values)

    def end(self) -> None:
        """The host knows that the copy is done."""
        self.check()
        assert self._values is not None
        self._is_over = True
        if self.stream == TO_HOST:
            self._destination.copy_(self._values)

    def check(self) -> None:
        if self.stream == TO_DEVICE and self._values is not None and not _same(self._source, self._values):
            raise AssertionError(f"the host wrote into the source of copy {self.number} while the copy was under way")

    def wait(self) -> Tensor:
        self._streams.events.append(("wait", self.number))
        self._streams.has_done(self._place)
        if not self._is_over:
            self._streams.settle(self, host=True)
        return self._destination

    def come_after(self) -> None:
        self._streams.known[self._streams.stream].add(-self.number)
        if not self._is_over:
            self._streams.settle(self, host=False)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextmanager
def on_late_streams(streams: LateStreams | None = None) -> Iterator[LateStreams]:
    """Engines made in this block believe that their device works by itself."""
    streams = streams or LateStreams()
    with inside.with_streams(streams):
        yield streams
    streams.check()
