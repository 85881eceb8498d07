"""The order of work on a device, copies to and from the host, and what the host may know of all that when.

[Note: copies]
Large copies between the host and a GPU have a stream for each direction, so both go on beside what computes. A copy
begins after what the current stream has been given by then. Whoever goes on where a copy has been has to come after
that copy, in one of two ways:

| what comes next                                                    | what it calls    | who waits          |
|--------------------------------------------------------------------|------------------|--------------------|
| work on the device: reads the destination, writes the source       | `come_after()`   | the current stream |
| the host: reads the destination, writes the source, frees either   | `wait()`         | the host           |

Nothing else orders the two sides. The memory of a copy is never freed under way: it is held for long by its owner, who
waits for its copies at the end. So no tensor needs `record_stream()`, after which torch's allocator would keep memory
for as long as the host runs ahead.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from partita import _core
from partita.device.capability import prepare_kernels
from partita.device.memory import HOST
from partita.device.polling import wait_until


class HostCopy(Protocol):
    """A copy between a device and the host that may be under way, see [Note: copies]."""

    def wait(self) -> Tensor:
        """The host waits for the copy. Returns the destination."""

    def come_after(self) -> None:
        """What is queued from now on on the current stream comes after the copy. The host goes on."""


class Moment(Protocol):
    """A place in a stream."""

    def take(self) -> None:
        """The place is the end of what the current stream has been given by now."""

    def come_after(self) -> None:
        """What is queued from now on on the current stream comes after the place that was taken last."""


class Streams(ABC):
    """The queues of one device, as seen by the thread that fills them.

    Work is queued on the current stream and done in that order. On the CPU it is done at once, so nothing here takes
    time there.
    """

    device: torch.device
    name: str  # of what computes, for people
    # Whether calls return before their work is done. If so, the host learns the outcome of a step during the next one.
    is_asynchronous: bool
    # Of native work on the host beside this device, such as the update of offloaded units; None: as many as torch uses.
    host_threads: int | None = None

    def __init__(self) -> None:
        # Called at least every 50 ms while the host waits for the device; what it raises ends the wait.
        self.while_waiting: Callable[[], None] = _nothing

    @abstractmethod
    def current(self) -> Any:
        """The stream that work is queued on now; hashable."""

    @abstractmethod
    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        """What is queued from now on runs after what is queued on `stream` by now, and may use `tensors` made there:
        their memory is not given to others before it is done."""

    @abstractmethod
    def hold_back(self, stream: Any, others: Iterable[Any]) -> None:
        """What is queued on `stream` from now on runs after what is queued on `others` by now."""

    @abstractmethod
    def moment(self) -> Moment:
        """A place in a stream, to be taken."""

    @abstractmethod
    def to_host(self) -> AbstractContextManager[None]:
        """In this block the stream of copies to the host is the current one. What it is given there comes after what
        the stream outside has been given by now."""

    @abstractmethod
    def to_device(self) -> AbstractContextManager[None]:
        """The same for the stream of copies from the host."""

    @abstractmethod
    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        """Starts copying a small tensor, as it is at this place of the current stream."""

    @abstractmethod
    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        """Starts copying a large tensor of the device into host memory, on the stream of copies to the host.

        Args:
            destination: contiguous, with the source's dtype and number of elements. In memory that is not pinned, the
                copy makes the host wait.
        """

    @abstractmethod
    def bring(self, destination: Tensor, source: Tensor) -> HostCopy:
        """Starts copying host memory into a tensor of the device, on the stream of copies from the host.

        Args:
            source: as `destination` of `copy_into`.
        """

    @abstractmethod
    def mark(self) -> Any:
        """A moment in the current stream, for `milliseconds`."""

    @abstractmethod
    def is_reached(self, mark: Any) -> bool:
        """Whether all that was queued before a mark is done. Nobody waits."""

    @abstractmethod
    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks; waits until the second one is reached."""


class InOrder:
    """Work of one owner, done in the order in which it is queued, on whichever streams."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._last = streams.current()  # that this owner has queued work on

    def enter(self) -> None:
        """What is queued next comes after all that was queued before."""
        self._streams.come_after(self._last, [])
        self._last = self._streams.current()


class AcrossStreams:
    """Memory that one stream makes ready, and that several streams may use until it is given up.

    Whoever is about to use the memory calls `use()`: nothing happens for a stream that did so before.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._ready = streams.moment()
        self._users: list[Any] = []  # one, as a rule: to compare streams is faster than to hash them

    def is_ready(self) -> None:
        """What the current stream has been given by now makes the memory ready."""
        self._ready.take()
        self._users = [self._streams.current()]

    def use(self) -> None:
        """What is queued from now on on the current stream may use the memory, if it has been made ready."""
        current = self._streams.current()
        if self._users and current not in self._users:
            self._ready.come_after()
            self._users.append(current)

    def give_up(self, stream: Any) -> None:
        """Nobody uses the memory any more: what is queued on `stream` from now on comes after all uses."""
        self._streams.hold_back(stream, [user for user in self._users if user != stream])
        self._users = []


def _nothing() -> None:
    return


class _Arrived:
    """A copy that is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor

    def come_after(self) -> None:
        return


class _Now:
    def take(self) -> None:
        return

    def come_after(self) -> None:
        return


class HostStreams(Streams):
    """The CPU: one stream, whose work is done when it is queued."""

    device = torch.device("cpu")
    name = _core.cpu_level()
    is_asynchronous = False

    def current(self) -> Any:
        return None

    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        return

    def hold_back(self, stream: Any, others: Iterable[Any]) -> None:
        return

    def moment(self) -> Moment:
        return _Now()

    def to_host(self) -> AbstractContextManager[None]:
        return nullcontext()

    def to_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        return _Arrived(tensor.clone())

    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        return _Arrived(destination.copy_(source))

    def bring(self, destination: Tensor, source: Tensor) -> HostCopy:
        return _Arrived(destination.copy_(source))

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class _CudaMoment:
    def __init__(self, streams: CudaStreams) -> None:
        self._streams = streams
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self) -> None:
        self._event.record(self._streams.current())

    def come_after(self) -> None:
        self._streams.current().wait_event(self._event)


class _CudaCopy:
    def __init__(self, streams: CudaStreams, destination: Tensor, event: torch.cuda.Event) -> None:
        self._streams = streams
        self._destination = destination
        self._event: torch.cuda.Event | None = event  # None: the host knows that it is done

    def wait(self) -> Tensor:
        if self._event is not None:
            self._streams.wait_for(self._event)
            self._event = None
        return self._destination

    def come_after(self) -> None:
        if self._event is not None:
            self._streams.current().wait_event(self._event)


class CudaStreams(Streams):
    """A GPU, through torch's streams."""

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._index = device.index  # which torch looks up faster than the device
        self.name = torch.cuda.get_device_name(device)
        self._to_host = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_device = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._index)

    def come_after(self, stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> None:
        current = self.current()
        if stream == current:
            return
        current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(current)

    def hold_back(self, stream: torch.cuda.Stream, others: Iterable[torch.cuda.Stream]) -> None:
        for other in others:
            stream.wait_stream(other)

    def moment(self) -> Moment:
        return _CudaMoment(self)

    def to_host(self) -> AbstractContextManager[None]:
        return self._on(self._to_host)

    def to_device(self) -> AbstractContextManager[None]:
        return self._on(self._to_device)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        current = self.current()
        if stream == current:  # inside of another such block
            yield
            return
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield

    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        return self._copy(torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True), tensor)

    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        with self.to_host():
            return self._copy(destination, source)

    def bring(self, destination: Tensor, source: Tensor) -> HostCopy:
        with self.to_device():
            return self._copy(destination, source)

    def _copy(self, destination: Tensor, source: Tensor) -> HostCopy:
        destination.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.current())
        return _CudaCopy(self, destination, event)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """The host waits until the device has passed `event`."""
        wait_until(event.query, self.while_waiting)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.current())
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        self.wait_for(end)
        return float(start.elapsed_time(end))


def streams_of(device: torch.device) -> Streams:
    """The streams of a CPU or CUDA device.

    Raises:
        RuntimeError: a CUDA device and a build without CUDA code, or not for this GPU or driver.
        ValueError: another kind of device.
    """
    if device.type == "cpu":
        return HostStreams()
    if device.type == "cuda":
        if not _core.built_with_cuda():
            raise RuntimeError(
                f"the model is on '{device}', and this build of Partita has no CUDA code: build it again with nvcc in "
                "PATH, or move the model to the CPU"
            )
        prepare_kernels(device)
        return CudaStreams(device)
    raise ValueError(f"device '{device}': Partita trains on the CPU and on CUDA devices")
