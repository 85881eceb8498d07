"""Collectives over torch.distributed: NCCL as it is, gloo with the point-to-point forms that are faster there."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita._core import CommunicationError, Reduction
from partita.comm.calls import Calls, why_ending, why_leaving
from partita.comm.communicator import Communicator, Handle
from partita.comm.groups import GROUP_TIMEOUT, OwnGroups
from partita.comm.lookout import LONG_WAIT_S, Lookout
from partita.comm.patience import MessageWaits, wait_for_collective
from partita.comm.waited import Waited
from partita.device import kernels
from partita.device.memory import HOST, flat_buffer

# Reduce-scatters of gloo that may be under way at once: each holds received slices of its buffer's size.
GLOO_REDUCE_SCATTERS_IN_FLIGHT = 2
# Apart from what the program itself sends between ranks.
REDUCE_SCATTER_TAG = 0x5A52
SEND_TAG = 0x5A53
# How long the end of a program waits for gloo's threads; what is under way when a rank has died may never end.
LET_GO_WITHIN_S = 1.0
LET_GO_AFTER_BREAK_S = 10.0  # what is under way ends then, where a loaded machine lets it
THREAD_SWITCH_S = 0.002
Start = Callable[[], dist.Work | None]
Finish = Callable[[], None] | None
# Of a receive that nobody answers, see `_break`.
BREAK_TAG = 0x5A54
BREAK_TIMEOUT = timedelta(milliseconds=1)
# Ctrl-C reaches the ranks of a terminal one after the other: how long a rank that a peer's ends waits for its own.
OWN_INTERRUPTION_WITHIN_S = 0.2
OPERATIONS = {
    Reduction.sum: dist.ReduceOp.SUM,
    Reduction.average: dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    Reduction.max: dist.ReduceOp.MAX,
}


class WorkHandle:
    """Works of torch.distributed that form one collective; keeps alive what they read and write.

    Args:
        wait: waits for the works; raises CommunicationError.
        finish: what is left to do then.
    """

    def __init__(
        self, works: list[dist.Work], keep: Tensor, wait: Callable[[list[dist.Work]], None], finish: Finish
    ) -> None:
        self._works = works
        self._keep: Tensor | None = keep
        self._wait: Callable[[list[dist.Work]], None] | None = wait
        self._finish = finish

    def wait(self) -> None:
        """Returns when the works are done and the result is in the buffer.

        Raises:
            CommunicationError: torch.distributed says that they failed, or another rank has ended or is in another
                collective; names the collective and this rank, or both calls.
        """
        if self._wait is None:
            return
        self._wait(self._works)
        self._works, self._wait = [], None
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

    When this rank gives up, by an error or a signal, it closes the connections of the group: its own threads end, and
    the other ranks learn at once that there is nothing to wait for, and why from the `Lookout`.
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
        self._messages = MessageWaits()
        self._waited_s, self._unknown_waited_s = [0.0] * self.world_size, 0.0
        find = weakref.ref(self)
        self._lookout = Lookout(
            str(group.group_name), self.rank, self.world_size, lambda: _calls_of(find()), GROUP_TIMEOUT.total_seconds()
        )
        weakref.finalize(self, _leave, group, self._lent if self._gloo else None, self._messages, self._lookout)

    def call_of_all(self, name: str) -> AbstractContextManager[None]:
        return self._meeting(name)

    def come_together(self, what: str) -> None:
        with self._naming(what, self._lookout.launches.count):
            self._lookout.await_all(what)

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
        start = self._send(_raw(tensor), destination, SEND_TAG)
        return self._launch("send", tensor, [start], messages=True, peer=destination)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        start = self._receive(_raw(tensor), source, SEND_TAG)
        return self._launch("receive", tensor, [start], messages=True, peer=source)

    def barrier(self) -> None:
        on_gpu = self.device.type == "cuda"
        ids = [self.device.index] if on_gpu else None
        self._launch(
            "barrier",
            torch.empty(0, dtype=torch.uint8, device=HOST),
            [self._asynchronous(dist.barrier, device_ids=ids)],
        ).wait()

    def waited(self) -> Waited | None:
        return Waited(tuple(self._waited_s), self._unknown_waited_s) if self._gloo else None

    def close(self) -> None:
        """Ends the process groups that were made for this communicator."""
        self._lookout.end(f"has left the group: {why_leaving()}")
        self._messages.close()
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
        self,
        name: str,
        tensor: Tensor,
        starts: list[Start],
        finish: Finish = None,
        *,
        messages: bool = False,
        peer: int | None = None,
    ) -> WorkHandle:
        """Args: messages: the works are sends and receives, which have no number. peer: of all of them."""
        dtype = "" if name == "barrier" else str(tensor.dtype)
        launches, counted = self._lookout.launches, name not in ("send", "receive")
        number = launches.add(self.calls.name, name, tensor.numel(), dtype) if counted else launches.count
        where = name if not dtype else f"{name} of {tensor.numel()} {dtype.removeprefix('torch.')}"
        with self._naming(where, number):
            works = [start() for start in starts]
        wait = partial(self._wait, where=where, number=number, messages=messages, peer=peer)
        return WorkHandle([work for work in works if work is not None], tensor, wait, finish)

    def _wait(self, works: list[dist.Work], *, where: str, number: int, messages: bool, peer: int | None) -> None:
        with self._naming(where, number):
            if not self._gloo:  # the stream waits, and not this thread
                for work in works:
                    work.wait()
                return
            watch = _Watch(self._lookout, number)
            began = time.perf_counter()
            if messages:
                self._messages.wait(works, watch)
            else:
                for work in works:
                    wait_for_collective(work, watch)
            watch.close()
            waited = time.perf_counter() - began
            if peer is None:
                self._unknown_waited_s += waited
            else:
                self._waited_s[peer] += waited

    @contextmanager
    def _naming(self, what: str, number: int) -> Iterator[None]:
        """Names the collective in the errors of torch.distributed, and the rank at fault if one has told. Raises at
        once after one of them."""
        where = f"{what}, on rank {self.rank} of {self.world_size} over {self.transport}"
        if self.failures:
            raise CommunicationError(f"{where}: after a failed collective ({self.failures[0]})")
        try:
            yield
        except CommunicationError as error:  # of the lookout, which names both sides
            self._give_up(str(error))
            raise
        except RuntimeError as error:
            why = self._lookout.why_ended(number)
            if "interrupted" in why:
                time.sleep(OWN_INTERRUPTION_WITHIN_S)
            unknown = f"{error} (when another rank has ended, what it printed last says why)"
            self._give_up(f"{where}: {why or unknown}")
            raise CommunicationError(self.failures[0]) from None
        except BaseException as error:  # the handler of a signal has raised
            self._give_up(f"{where}: interrupted by {type(error).__name__}")
            raise

    def _give_up(self, failure: str) -> None:
        self.failures.append(failure)
        self._lookout.end(f"gave up: {failure}", gave_up=True)
        if self._gloo:
            _break(self._group, self.rank, self.world_size)

    @contextmanager
    def _meeting(self, name: str) -> Iterator[None]:
        with ExitStack() as exits:
            with self._naming(name, self._lookout.launches.count):
                exits.enter_context(self._lookout.meet(name))
            yield

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

        handle = self._launch("reduce_scatter", buffer, starts, reduce_in_rank_order, messages=True)
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


class _Watch:
    """Looks around every now and then, while a collective is waited for."""

    def __init__(self, lookout: Lookout, number: int) -> None:
        self._lookout = lookout
        self._number = number
        self._looked_at = time.monotonic()
        self._is_long = False

    def __call__(self) -> None:
        """Raises CommunicationError if the wait is in vain."""
        now = time.monotonic()
        if now - self._looked_at < LONG_WAIT_S:
            return
        self._looked_at, self._is_long = now, True
        if why := self._lookout.look(self._number):
            raise CommunicationError(why)

    def close(self) -> None:
        """The wait is over."""
        if self._is_long:
            self._lookout.go_on()


def _break(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Closes the connections of a group of gloo: what a receive does when its time is over."""
    with suppress(RuntimeError):
        nothing = torch.empty(1, dtype=torch.uint8, device=HOST)
        group.recv([nothing], (rank + 1) % world_size, BREAK_TAG).wait(BREAK_TIMEOUT)


def _calls_of(communicator: TorchCommunicator | None) -> Calls:
    return Calls() if communicator is None else communicator.calls


def _leave(
    group: dist.ProcessGroup,
    lent: weakref.WeakValueDictionary[int, Tensor] | None,
    messages: MessageWaits,
    lookout: Lookout,
) -> None:
    """Tells why this rank has ended, and waits until a group's threads have let go of all tensors. If they do not, the
    group stays for ever: letting go of it would wait for them, and so would ranks that wait for the end of this
    process.

    Args:
        lent: None where the backend has no such threads.
    """
    lookout.end(f"has left the group: {why_ending()}")
    messages.close()
    if lent is None:
        return
    deadline = time.monotonic() + LET_GO_WITHIN_S
    while lent and time.monotonic() < deadline:
        time.sleep(THREAD_SWITCH_S)
    if lent:  # what is under way waits for a rank that does not come
        _break(group, dist.get_rank(group), dist.get_world_size(group))
        deadline += LET_GO_AFTER_BREAK_S
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
