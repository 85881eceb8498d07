"""Transports with bad manners: late, slow, talkative, and with garbage in their buffers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import inside
import torch
from partita.comm import Communicator, Done, Handle, Reduction, world_communicator
from torch import Tensor


def world_communicator_by_default(transport: str) -> Callable[..., Communicator]:
    """`world_communicator` for tests that run on a transport of pytest's choice: "auto" now means that one."""

    def make(asked: str = "auto", *args: Any, **kwargs: Any) -> Communicator:
        return world_communicator(transport if asked == "auto" else asked, *args, **kwargs)

    return make


@contextmanager
def communicating_through(make: Callable[[Communicator], Any]) -> Iterator[Any]:
    """Engines made in this block use `make(the real communicator)`, and another one made like it beside that."""
    world = inside.connect()  # of the transport under test
    made = make(world())
    wrapped: list[Communicator] = []

    def connect(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("beside") is None:
            return made
        beside = make(inner := world(*args, **kwargs))
        if beside is not inner:
            wrapped.append(inner)  # whom the engine does not close
            made.beside = beside
        return beside

    with inside.with_connect(connect):
        yield made
    for inner in wrapped:
        inner.close()


class Wrapped(Communicator):
    """Hands every collective to `start`, which subclasses change."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank, self.world_size, self.transport = inner.rank, inner.world_size, inner.transport
        self.shares_memory = inner.shares_memory
        self.beside: Any = None  # the one that `communicating_through` made for the same engine

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        return collective()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self.inner.empty(numel, dtype)

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        return self.inner.mapped(numel, dtype)

    def mapped_multiple(self, dtype: torch.dtype) -> int:
        return self.inner.mapped_multiple(dtype)

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self.start("all_reduce", buffer, partial(self.inner.all_reduce, buffer, reduction))

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self.start("reduce_scatter", buffer, partial(self.inner.reduce_scatter, buffer, reduction))

    def all_gather(self, buffer: Tensor) -> Handle:
        return self.start("all_gather", buffer, partial(self.inner.all_gather, buffer))

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        return self.start("broadcast", tensor, partial(self.inner.broadcast, tensor, root))

    def send(self, tensor: Tensor, destination: int) -> Handle:
        return self.start("send", tensor, partial(self.inner.send, tensor, destination))

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self.start("recv", tensor, partial(self.inner.recv, tensor, source))

    def barrier(self) -> None:
        self.start("barrier", torch.empty(0), self._barrier).wait()

    def _barrier(self) -> Handle:
        self.inner.barrier()
        return Done()

    def close(self) -> None:
        """Several engines share the transport of a test."""


class _Late:
    """A collective that runs after its launch; the buffer must be then what it was at the launch."""

    def __init__(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> None:
        self._name, self._buffer, self._collective = name, buffer, collective
        self._at_launch = _bytes(buffer).clone()

    def run(self) -> None:
        changed = int((_bytes(self._buffer) != self._at_launch).sum())
        self._collective().wait()
        if changed:
            raise AssertionError(f"{changed} bytes of a buffer were rewritten while its {self._name} was under way")


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.detach().reshape(-1).view(torch.uint8)


class SlowCommunicator(Wrapped):
    """Each collective takes a while, on a thread of its own."""

    DELAY_S = 0.002

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self._thread = ThreadPoolExecutor(max_workers=1)  # one, so that all ranks keep the order of launch

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        late = _Late(name, buffer, collective)
        return _Pending(self._thread.submit(self._run, late))

    def _run(self, late: _Late) -> None:
        time.sleep(self.DELAY_S)
        late.run()


class _Pending:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class WaitingCommunicator(Wrapped):
    """No collective starts before somebody waits for it, or for a later one."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self._queue: deque[_WhenWaited] = deque()

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        handle = _WhenWaited(_Late(name, buffer, collective), self._queue)
        self._queue.append(handle)
        return handle


class _WhenWaited:
    def __init__(self, late: _Late, queue: deque[_WhenWaited]) -> None:
        self._late, self._queue = late, queue

    def wait(self) -> None:
        while self in self._queue:
            self._queue.popleft()._late.run()


class RecordingCommunicator(Wrapped):
    """Keeps a list of what happened: ("launch" or "wait", collective, dtype, elements), ("barrier",), and what a test
    adds."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.events: list[tuple[Any, ...]] = []

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        what = (name, buffer.dtype, buffer.numel())
        self.events.append(("launch", *what))
        return _Recorded(collective(), partial(self.events.append, ("wait", *what)))

    def barrier(self) -> None:
        self.events.append(("barrier",))
        self.inner.barrier()

    def launches(self) -> list[tuple[str, torch.dtype]]:
        """(collective, dtype) of all launches so far."""
        return [event[1:3] for event in self.events if event[0] == "launch"]


class _Recorded:
    def __init__(self, handle: Handle, on_wait: Callable[[], None]) -> None:
        self._handle, self._on_wait = handle, on_wait

    def wait(self) -> None:
        self._on_wait()
        self._handle.wait()


class GarbageCommunicator(Wrapped):
    """Buffers come full of NaN, so whatever is read before it is written shows."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.filled = 0  # elements

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.filled += numel
        return self.inner.empty(numel, dtype).fill_(float("nan"))

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        buffer = self.inner.mapped(numel, dtype)
        if buffer is not None:
            self.filled += self.slice_of(buffer).fill_(float("nan")).numel()
        return buffer
