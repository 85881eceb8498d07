"""What the communicators of a rank launch and wait for, in the order of the program, and whether ranks could ever wait
for each other in a circle.

[Note: one queue]
A GPU may have a single queue for all streams (`CUDA_DEVICE_MAX_CONNECTIONS=1`); with more streams than queues some
streams share one at any setting. Such a queue is worked off in the order of the host's program. What waits at its head
holds up all that follows, on whichever stream. A wait of a stream for a collective does so; and a collective, while it
waits for the one before it in its own stream. So everything may come after all that was waited for before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import inside
import torch.distributed as dist
from communicators import Wrapped
from partita.comm import Communicator, Handle
from torch import Tensor


@dataclass(frozen=True)
class Event:
    """A launch of a collective or message, or a wait for it.

    Attributes:
        what: "launch" or "wait".
        key: the same on all ranks that take part, and unique.
        stream: that carries it.
    """

    what: str
    key: str
    stream: str


@dataclass
class Record:
    """What one rank's program did, in its order."""

    events: list[Event] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def launch(self, series: str, stream: str, name: str) -> Event:
        """The next of a series, which all ranks number alike."""
        number = self.counts[series] = self.counts.get(series, -1) + 1
        event = Event("launch", f"{series} {number}: {name}", stream)
        self.events.append(event)
        return event

    def launches(self) -> list[str]:
        return [event.key for event in self.events if event.what == "launch"]


class NotedCommunicator(Wrapped):
    """Writes what it carries into a record that several communicators share.

    Args:
        name: of the group.
        stream_of: the stream of messages between two ranks, by sender and receiver.
    """

    def __init__(self, inner: Communicator, record: Record, name: str, stream_of: Callable[[int, int], str]) -> None:
        super().__init__(inner)
        self._record, self._name, self._stream_of = record, name, stream_of

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        event = self._record.launch(self._name, self._name, f"{name} {buffer.numel()}")
        if name == "barrier":
            self._record.events.append(Event("wait", event.key, event.stream))
        return _Noted(collective(), self._record, event)

    def come_together(self, what: str) -> None:
        self.inner.come_together(what)

    def send(self, tensor: Tensor, destination: int) -> Handle:
        return self._message(self.rank, destination, self.inner.send(tensor, destination))

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._message(source, self.rank, self.inner.recv(tensor, source))

    def _message(self, source: int, destination: int, handle: Handle) -> Handle:
        series = f"{self._name} {source}>{destination}"
        stream = f"{self._name} {self._stream_of(source, destination)}"
        return _Noted(handle, self._record, self._record.launch(series, stream, "message"))


class _Noted:
    def __init__(self, handle: Handle, record: Record, launched: Event) -> None:
        self._handle, self._record, self._launched = handle, record, launched
        self._waited = False

    def wait(self) -> None:
        if not self._waited:
            self._waited = True
            self._record.events.append(Event("wait", self._launched.key, self._launched.stream))
        self._handle.wait()


@contextmanager
def noting_order(stream_of: Callable[[int, int], str] = "{}>{}".format) -> Iterator[Record]:
    """What the engines made in this block launch and wait for."""
    record, world, made = Record(), inside.connect(), []

    def connect(*args: Any, beside: Any = None, parts: Any = None) -> Communicator:
        inner = world(*args, beside=beside and beside.inner, parts=parts)
        ranks = next(part for part in parts or [range(dist.get_world_size())] if dist.get_rank() in part)
        made.append(inner)
        return NotedCommunicator(inner, record, f"communicator {len(made)} of {list(ranks)}", stream_of)

    with inside.with_connect(connect):
        yield record
    for inner in reversed(made):
        inner.close()


def circle_of(records: Sequence[Record], *, one_queue: bool = True) -> list[str] | None:
    """What may wait for each other in a circle, in its order; None: nothing, so no deadlock.

    A collective is done when all ranks have begun it. The nodes of the graph are collectives, and points in the program
    of each rank.

    Args:
        one_queue: see [Note: one queue]. Otherwise each stream has a queue, and a launch comes after what the program
            has waited for, and after what its own stream has.
    """
    graph: TopologicalSorter[str] = TopologicalSorter()
    for rank, record in enumerate(records):
        last: dict[str, str] = {}  # by stream
        point = f"rank {rank}, start"
        for i, event in enumerate(record.events):
            before, point = point, f"rank {rank}, {event.what} {i}"
            graph.add(point, before)
            if event.what == "wait":
                graph.add(point, event.key)
                continue
            if event.stream in last:
                graph.add(point if one_queue else event.key, last[event.stream])
            graph.add(event.key, point)
            last[event.stream] = event.key
    try:
        graph.prepare()
    except CycleError as error:
        return [str(node) for node in error.args[1]]
    return None


def first_difference(records: Sequence[Record]) -> str | None:
    """Where ranks launch in different orders; None: all launch the same in one order."""
    orders = [record.launches() for record in records]
    for i in range(max(map(len, orders))):
        if len({tuple(order[i : i + 1]) for order in orders}) > 1:
            return "; ".join(f"rank {r}: {order[max(0, i - 3) : i + 3]}" for r, order in enumerate(orders))
    return None
