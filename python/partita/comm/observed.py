"""A communicator that tells what it carries, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita._core import Reduction
from partita.comm.communicator import Communicator, Handle
from partita.comm.waited import Waited


@dataclass(frozen=True)
class Carried:
    """A collective, a send or a receive that is over, for the program.

    Attributes:
        axis: of the grid: "world", "data" or "pipe"; "beside": data-parallel ranks, in an order of its own, as stage 3
            gathers parameters.
        operation: its name, as `Communicator` has it.
        nbytes: of the whole tensor.
        call: the engine call that the program was in; may be empty.
        launched_s: when it was launched, in seconds of `time.perf_counter`.
        wait_s: when the program began to wait for it.
        done_s: when the program had waited for it. On a GPU the stream waits, and not the program.
        marks: `mark()` at the launch and after the wait, see `Streams.mark`.
        ranks: the size of the group.
    """

    axis: str
    operation: str
    nbytes: int
    call: str
    launched_s: float
    wait_s: float
    done_s: float
    marks: tuple[Any, Any]
    ranks: int


Listener = Callable[[Carried], None]


class Observed(Communicator):
    """What `inner` does, told to listeners.

    Args:
        axis: of the grid, for `Carried`.
        listeners: are called after each operation; the list may change.
        mark: a moment on the device.
    """

    def __init__(self, inner: Communicator, axis: str, listeners: list[Listener], mark: Callable[[], Any]) -> None:
        self.inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size
        self.transport, self.device, self.shares_memory = inner.transport, inner.device, inner.shares_memory
        self.sums_in_fp32, self.calls = inner.sums_in_fp32, inner.calls
        self._axis, self._listeners, self._mark = axis, listeners, mark

    def check_progress(self) -> None:
        self.inner.check_progress()

    def connect_pairs(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.inner.connect_pairs(pairs)

    def call_of_all(self, name: str) -> AbstractContextManager[None]:
        return self.inner.call_of_all(name)

    def come_together(self, what: str) -> None:
        self.inner.come_together(what)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self.inner.empty(numel, dtype)

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        return self.inner.mapped(numel, dtype)

    def mapped_multiple(self, dtype: torch.dtype) -> int:
        return self.inner.mapped_multiple(dtype)

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self._begin("all_reduce", buffer.nbytes, lambda: self.inner.all_reduce(buffer, reduction))

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self._begin("reduce_scatter", buffer.nbytes, lambda: self.inner.reduce_scatter(buffer, reduction))

    def all_gather(self, buffer: Tensor) -> Handle:
        return self._begin("all_gather", buffer.nbytes, lambda: self.inner.all_gather(buffer))

    def all_gather_into(self, full: Tensor, shard: Tensor) -> Handle:
        return self._begin("all_gather", full.nbytes, lambda: self.inner.all_gather_into(full, shard))

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        return self._begin("broadcast", tensor.nbytes, lambda: self.inner.broadcast(tensor, root))

    def send(self, tensor: Tensor, destination: int) -> Handle:
        return self._begin("send", tensor.nbytes, lambda: self.inner.send(tensor, destination))

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._begin("recv", tensor.nbytes, lambda: self.inner.recv(tensor, source))

    def barrier(self) -> None:
        self._begin("barrier", 0, lambda: _Barrier(self.inner)).wait()

    def waited(self) -> Waited | None:
        return self.inner.waited()

    def close(self) -> None:
        self.inner.close()

    def leave(self, reason: str) -> None:
        self.inner.leave(reason)

    def _begin(self, operation: str, nbytes: int, launch: Callable[[], Handle]) -> Handle:
        if not self._listeners:
            return launch()
        call, launched, mark = self.calls.name, time.perf_counter(), self._mark()
        handle = launch()

        def tell(wait: float) -> None:
            done = time.perf_counter()
            marks = (mark, self._mark())
            carried = Carried(self._axis, operation, nbytes, call, launched, wait, done, marks, self.world_size)
            for listener in list(self._listeners):
                listener(carried)

        return _ObservedHandle(handle, tell)


class _Barrier:
    def __init__(self, inner: Communicator) -> None:
        self._inner = inner

    def wait(self) -> None:
        self._inner.barrier()


class _ObservedHandle:
    def __init__(self, handle: Handle, tell: Callable[[float], None]) -> None:
        self._handle = handle
        self._tell: Callable[[float], None] | None = tell

    def wait(self) -> None:
        if self._tell is None:
            return
        began = time.perf_counter()
        self._handle.wait()
        tell, self._tell = self._tell, None
        tell(began)
