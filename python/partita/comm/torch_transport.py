"""Collectives over torch.distributed: NCCL as it is, gloo with the point-to-point forms that are faster there."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita._core import CommunicationError, Reduction
from partita.comm.communicator import Communicator, Handle
from partita.comm.groups import OwnGroups
from partita.device import kernels
from partita.device.memory import HOST, flat_buffer

# Reduce-scatters of gloo that may be under way at once: each holds received slices of its buffer's size.
GLOO_REDUCE_SCATTERS_IN_FLIGHT = 2
# Apart from what the program itself sends between ranks.
REDUCE_SCATTER_TAG = 0x5A52
SEND_TAG = 0x5A53
# How long the end of a program waits for gloo's threads; what is under way when a rank has died may never end.
LET_GO_WITHIN_S = 1.0
THREAD_SWITCH_S = 0.002
Start = Callable[[], dist.Work | None]
OPERATIONS = {
    Reduction.sum: dist.ReduceOp.SUM,
    Reduction.average: dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    Reduction.max: dist.ReduceOp.MAX,
}


class WorkHandle:
    """Works of torch.distributed that form one collective; keeps alive what they read and write."""

    def __init__(
        self,
        works: list[dist.Work],
        keep: Tensor,
        naming: Callable[[], AbstractContextManager[None]],
        finish: Callable[[], None] | None,
    ) -> None:
        self._works = works
        self._keep: Tensor | None = keep
        self._naming: Callable[[], AbstractContextManager[None]] | None = naming
        self._finish = finish

    def wait(self) -> None:
        """Returns when the works are done and the result is in the buffer.

        Raises:
            CommunicationError: torch.distributed says that they failed; names the collective and this rank.
        """
        if self._naming is None:
            return
        with self._naming():
            for work in self._works:
                work.wait()
        self._works, self._naming = [], None
        finish, self._finish, self._keep = self._finish, None, None
        if finish is not None:
            finish()


class TorchCommunicator(Communicator):
    """A process group of torch.distributed. When a collective has failed, every later launch or wait raises at once:
    ranks that wait for each other behind a rank that has died would do so until the group's timeout.

    [Note: gloo]
    Gloo's reduce_scatter is an all-reduce and a copy, its all_gather stages through a second buffer. Sending each
    slice to its owner, and broadcasting each slice in place, moves the bytes once: 2 to 4 times faster at 4 MiB and
    above. It also fixes the order of summation (rank 0, 1, 2, ...) and rounds 16-bit sums once, from fp32.

    A thread of gloo lets go of a collective's tensors shortly after others know it to be done, and needs Python's lock
    for that. Once a program is ending no thread gets the lock, and the process would abort. So these threads get
    tensors that nobody else has, and at the end of the program, or of this communicator, we wait until they are gone.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device = HOST, own: OwnGroups | None = None) -> None:
        self._group = group
        self._own = own or OwnGroups()
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.transport = backend_of(group, device) or str(dist.get_backend(group))
        self.failures: list[str] = []  # shared by groups that fail together
        self._gloo = self.transport == "gloo"
        self._reducing: deque[WorkHandle] = deque()
        self._received: dict[torch.dtype, list[Tensor]] = {}  # buffers free for the next reduce-scatter
        self._lent_so_far = count()
        self._lent: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # to threads of gloo
        if self._gloo:
            weakref.finalize(self, _leave, group, self._lent)

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        start = self._asynchronous(dist.all_reduce, self._lend(_contiguous(buffer)), OPERATIONS[reduction])
        return self._launch("all_reduce", buffer, [start], self._division(buffer, reduction))

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        own = self.slice_of(_contiguous(buffer))
        if self._gloo:
            native = buffer.dtype in kernels.DTYPES
            return self._gloo_reduce_scatter(buffer, reduction) if native else self.all_reduce(buffer, reduction)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        start = self._asynchronous(reduce_scatter, own, buffer, OPERATIONS[reduction])
        return self._launch("reduce_scatter", buffer, [start], self._division(own, reduction))

    def all_gather(self, buffer: Tensor) -> Handle:
        slices = self.slices(_contiguous(buffer))
        if not self._gloo:
            return self.all_gather_into(buffer, slices[self.rank])
        return self._launch("all_gather", buffer, [self._broadcast(s, root) for root, s in enumerate(slices)])

    def all_gather_into(self, full: Tensor, shard: Tensor) -> Handle:
        if self._gloo:
            return super().all_gather_into(full, shard)
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return self._launch("all_gather", full, [self._asynchronous(all_gather, _contiguous(full), shard)])

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        self._check_rank("broadcast from", root)
        return self._launch("broadcast", tensor, [self._broadcast(_raw(tensor), root)])

    def send(self, tensor: Tensor, destination: int) -> Handle:
        return self._launch("send", tensor, [self._send(_raw(tensor), destination, SEND_TAG)])

    def recv(self, tensor: Tensor, source: int) -> Handle:
        return self._launch("receive", tensor, [self._receive(_raw(tensor), source, SEND_TAG)])

    def barrier(self) -> None:
        on_gpu = self.device.type == "cuda"
        with self._naming("barrier"):
            dist.barrier(self._group, device_ids=[self.device.index] if on_gpu else None)

    def close(self) -> None:
        """Ends the process groups that were made for this communicator."""
        self._own.end()

    def _asynchronous(self, collective: Callable[..., dist.Work | None], *args: Any, **kwargs: Any) -> Start:
        return partial(collective, *args, group=self._group, async_op=True, **kwargs)

    def _broadcast(self, tensor: Tensor, root: int) -> Start:
        return self._asynchronous(dist.broadcast, self._lend(tensor), group_src=root)

    def _send(self, tensor: Tensor, destination: int, tag: int) -> Start:
        return partial(dist.isend, tensor, group=self._group, tag=tag, group_dst=destination)

    def _receive(self, tensor: Tensor, source: int, tag: int) -> Start:
        return partial(dist.irecv, tensor, group=self._group, tag=tag, group_src=source)

    def _launch(
        self, name: str, tensor: Tensor, starts: list[Start], finish: Callable[[], None] | None = None
    ) -> WorkHandle:
        naming = partial(self._naming, f"{name} of {tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}")
        with naming():
            works = [start() for start in starts]
        return WorkHandle([work for work in works if work is not None], tensor, naming, finish)

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Names the collective in the errors of torch.distributed; raises at once after one of them."""
        where = f"{what}, on rank {self.rank} of {self.world_size} over {self.transport}"
        if self.failures:
            raise CommunicationError(f"{where}: after a failed collective ({self.failures[0]})")
        try:
            yield
        except RuntimeError as error:
            self.failures.append(f"{where}: {error} (when another rank has ended, what it printed last says why)")
            raise CommunicationError(self.failures[0]) from error

    def _lend(self, tensor: Tensor) -> Tensor:
        """The same memory for a thread of the backend, see [Note: gloo]."""
        if not self._gloo:
            return tensor
        lent = self._lent[next(self._lent_so_far)] = tensor.data  # a view would keep its base
        return lent

    def _gloo_reduce_scatter(self, buffer: Tensor, reduction: Reduction) -> Handle:
        while len(self._reducing) >= GLOO_REDUCE_SCATTERS_IN_FLIGHT:
            self._reducing.popleft().wait()
        slices = self.slices(buffer)
        received = self._take_received(slices[0].numel() * (self.world_size - 1), buffer.dtype)
        peers = [r for r in range(self.world_size) if r != self.rank]
        incoming = dict(zip(peers, received[: slices[0].numel() * len(peers)].chunk(len(peers)), strict=True))
        starts = [self._receive(incoming[r], r, REDUCE_SCATTER_TAG) for r in peers]
        starts += [self._send(slices[r], r, REDUCE_SCATTER_TAG) for r in peers]

        def reduce_in_rank_order() -> None:
            own = slices[self.rank]
            kernels.reduce(own, [incoming.get(r, own) for r in range(self.world_size)], reduction)
            self._received.setdefault(buffer.dtype, []).append(received)

        handle = self._launch("reduce_scatter", buffer, starts, reduce_in_rank_order)
        self._reducing.append(handle)
        return handle

    def _take_received(self, numel: int, dtype: torch.dtype) -> Tensor:
        free = self._received.get(dtype, [])
        while free:
            if (buffer := free.pop()).numel() >= numel:
                return buffer
        return flat_buffer(numel, dtype)

    def _division(self, result: Tensor, reduction: Reduction) -> Callable[[], None] | None:
        """What an average still needs."""
        return partial(_divide, result, self.world_size) if reduction == Reduction.average else None


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """What carries a device's tensors in a group (which may have a backend per kind of device); None: nothing does."""
    try:
        return str(group._get_backend(torch.device(device.type)).name())
    except RuntimeError:
        return None


def _leave(group: dist.ProcessGroup, lent: weakref.WeakValueDictionary[int, Tensor]) -> None:
    """Waits until a group's threads have let go of all tensors. If they do not, the group stays for ever: letting go of
    it would wait for them, and so would ranks that wait for the end of this process."""
    deadline = time.monotonic() + LET_GO_WITHIN_S
    while lent and time.monotonic() < deadline:
        time.sleep(THREAD_SWITCH_S)
    time.sleep(THREAD_SWITCH_S)  # the last one may be giving back the memory, with the lock
    if lent:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _divide(result: Tensor, divisor: int) -> None:
    result /= divisor


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: of any dtype, those unknown to the backend too."""
    return _contiguous(tensor).view(-1).view(torch.uint8)


def _contiguous(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    return tensor
