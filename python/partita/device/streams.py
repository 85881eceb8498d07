"""The order of work on a device, and what the host may know of it when."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from partita import _core
from partita.device.memory import HOST


class HostCopy(Protocol):
    """Bytes of a device on their way to the host."""

    def wait(self) -> Tensor:
        """The bytes, in host memory, once they have arrived."""


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

    @abstractmethod
    def current(self) -> Any:
        """The stream that work is queued on now; hashable."""

    @abstractmethod
    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        """What is queued from now on runs after what is queued on `stream` by now, and may use `tensors` made there:
        their memory is not given to others before it is done."""

    @abstractmethod
    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        """Starts copying a tensor, as it is at this place of the current stream."""

    @abstractmethod
    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        """Starts copying a tensor of the device into pinned host memory."""

    @abstractmethod
    def mark(self) -> Any:
        """A moment in the current stream, for `milliseconds`."""

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


class _Arrived:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


class HostStreams(Streams):
    """The CPU: one stream, whose work is done when it is queued."""

    device = torch.device("cpu")
    name = _core.cpu_level()
    is_asynchronous = False

    def current(self) -> Any:
        return None

    def come_after(self, stream: Any, tensors: Iterable[Tensor]) -> None:
        return

    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        return _Arrived(tensor.clone())

    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        return _Arrived(destination.copy_(source))

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class _Arriving:
    def __init__(self, host: Tensor, event: torch.cuda.Event) -> None:
        self._host = host
        self._event: torch.cuda.Event | None = event

    def wait(self) -> Tensor:
        if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
            self._event.synchronize()
        self._event = None
        return self._host


class CudaStreams(Streams):
    """A GPU, through torch's streams."""

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def come_after(self, stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> None:
        current = self.current()
        if stream == current:
            return
        current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(current)

    def copy_to_host(self, tensor: Tensor) -> HostCopy:
        return self.copy_into(torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=True), tensor)

    def copy_into(self, destination: Tensor, source: Tensor) -> HostCopy:
        destination.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.current())
        return _Arriving(destination, event)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.current())
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end))


def streams_of(device: torch.device) -> Streams:
    """The streams of a CPU or CUDA device.

    Raises:
        RuntimeError: a CUDA device and a build without CUDA code.
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
        return CudaStreams(device)
    raise ValueError(f"device '{device}': Partita trains on the CPU and on CUDA devices")
