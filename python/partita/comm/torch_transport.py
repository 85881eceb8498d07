"""Collectives over torch.distributed: NCCL as it is, gloo with the point-to-point forms that are faster there."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita._core import CommunicationError, Reduction
from partita.comm.calls import Calls, why_leaving
from partita.comm.communicator import Communicator, Handle
from partita.comm.fate import Fate, break_connections
from partita.comm.groups import GROUP_TIMEOUT, OwnGroups, backend_of, has_nccl, host_patience_s
from partita.comm.leaving import Ending
from partita.comm.lookout import Lookout, Watch
from partita.comm.outstanding import Finish, Launched, Outstanding, WorkHandle
from partita.comm.patience import MessageWaits, wait_for_collective
from partita.comm.waited import Waited
from partita.device import kernels
from partita.device.memory import HOST, flat_buffer

# Backends whose own collectives are slower than messages between the ranks, and whose waits are the host's.
FASTER_BY_MESSAGES = frozenset({"gloo"})
# Reduce-scatters of gloo that may be under way at once: each holds received slices of its buffer's size.
GLOO_REDUCE_SCATTERS_IN_FLIGHT = 2
# Apart from what the program itself sends between ranks.
REDUCE_SCATTER_TAG = 0x5A52
SEND_TAG = 0x5A53
Start = Callable[[], dist.Work | None]
# Ctrl-C reaches the ranks of a terminal one after the other: how long a rank that a peer's ends waits for its own.
OWN_INTERRUPTION_WITHIN_S = 0.2
OPERATIONS = {
    Reduction.sum: dist.ReduceOp.SUM,
    Reduction.average: dist.ReduceOp.SUM,  # divided afterwards: gloo has no average
    Reduction.max: dist.ReduceOp.MAX,
}


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

    [Note: messages over NCCL]
    Messages between two ranks have one queue per process group, in both directions. A pipeline sends both ways: rank 0
    would send forwards what rank 1 takes after its gradient, and rank 1 send the gradient that rank 0 takes after that.
    Neither kernel would end. So messages to lower ranks have a group of their own: of two queues, each has one
    direction, in the order in which the receiver takes what is sent.

    Args:
        own: ends with the communicator.
        timeout: how long the host waits for a collective, where waits are those of a stream.
        fate: shared with those that fail together with this one.
        downwards: for messages to lower ranks; None: there is no need.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device = HOST,
        own: OwnGroups | None = None,
        *,
        timeout: timedelta = GROUP_TIMEOUT,
        fate: Fate | None = None,
        downwards: dist.ProcessGroup | None = None,
    ) -> None:
        self._group, self._downwards = group, downwards
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.transport = backend_of(group, device) or str(dist.get_backend(group))
        self.fate = fate or Fate()
        self._gloo = self.transport == "gloo"
        self._whole = self.transport not in FASTER_BY_MESSAGES
        self.sums_in_fp32 = not self._whole
        self._gave_up = self._has_begun = False
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
        self._outstanding = Outstanding(self._lookout, host_patience_s(group, timeout))
        for each in filter(None, (group, downwards)):
            if self.transport == "nccl" and has_nccl(each):
                self.fate.concerns(each)
        self._ending = Ending(
            group,
            own or OwnGroups(),
            self._messages,
            self._lookout,
            self.fate,
            self._lent if self._gloo else None,
            self._outstanding if self._whole else None,
        )
        weakref.finalize(self, self._ending.with_the_program)

    def call_of_all(self, name: str) -> AbstractContextManager[None]:
        return self._meeting(name)

    def come_together(self, what: str) -> None:
        with self._naming(what, self._lookout.launches.count):
            self._lookout.await_all(what)

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        start = self._asynchronous(dist.all_reduce, self._lend(_contiguous(buffer)), OPERATIONS[reduction])
        return self._launch("all_reduce", buffer, [start], _division(buffer, reduction, self.world_size))

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        own = self.slice_of(_contiguous(buffer))
        if not self._whole:
            native = buffer.dtype in kernels.DTYPES
            return self._gloo_reduce_scatter(buffer, reduction) if native else self.all_reduce(buffer, reduction)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        start = self._asynchronous(reduce_scatter, own, buffer, OPERATIONS[reduction])
        return self._launch("reduce_scatter", buffer, [start], _division(own, reduction, self.world_size))

    def all_gather(self, buffer: Tensor) -> Handle:
        slices = self.slices(_contiguous(buffer))
        if self._whole:
            return self.all_gather_into(buffer, slices[self.rank])
        return self._launch("all_gather", buffer, [self._broadcast(s, root) for root, s in enumerate(slices)])

    def all_gather_into(self, full: Tensor, shard: Tensor) -> Handle:
        if not self._whole:
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
        self._require_here("recv", tensor)
        start = self._receive(_raw(tensor), source, SEND_TAG)
        return self._launch("receive", tensor, [start], messages=True, peer=source)

    def connect_pairs(self, pairs: Sequence[tuple[int, int]]) -> None:
        if self._whole:
            with self._naming("messages", 0):
                self._begin()
            for source, destination in pairs:
                token = torch.zeros(1, dtype=torch.uint8, device=self.device)
                if self.rank == source:
                    self.send(token, destination).wait()
                elif self.rank == destination:
                    self.recv(token, source).wait()

    def barrier(self) -> None:
        # That of torch.distributed would let the host wait in NCCL, and chooses a GPU by itself.
        token = torch.zeros(1, dtype=torch.float32, device=self.device)
        start = self._asynchronous(dist.all_reduce, self._lend(token))
        self._launch("barrier", token, [start]).wait()
        self.to_host(token)

    def check_progress(self) -> None:
        if not self._whole or self._gave_up:
            return
        if self.fate.failures:  # which was raised elsewhere; what this one has under way was ended with it
            self._give_up(self.fate.failures[0])
            return
        try:
            self._outstanding.check()
        except CommunicationError as error:
            self._give_up(str(error))
            raise

    def waited(self) -> Waited | None:
        return None if self._whole else Waited(tuple(self._waited_s), self._unknown_waited_s)

    def close(self) -> None:
        """Ends the process groups that were made for this communicator."""
        self._ending.close(why_leaving())

    def _asynchronous(self, collective: Callable[..., dist.Work | None], *args: Any, **kwargs: Any) -> Start:
        return partial(collective, *args, group=self._group, async_op=True, **kwargs)

    def _broadcast(self, tensor: Tensor, root: int) -> Start:
        return self._asynchronous(dist.broadcast, self._lend(tensor), group_src=root)

    def _send(self, tensor: Tensor, destination: int, tag: int) -> Start:
        group = self._group_of_messages(self.rank, destination)
        return partial(dist.isend, tensor, group=group, tag=tag, group_dst=destination)

    def _receive(self, tensor: Tensor, source: int, tag: int) -> Start:
        group = self._group_of_messages(source, self.rank)
        return partial(dist.irecv, tensor, group=group, tag=tag, group_src=source)

    def _group_of_messages(self, source: int, destination: int) -> dist.ProcessGroup:
        """See [Note: messages over NCCL]."""
        return self._group if self._downwards is None or source < destination else self._downwards

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
        self._require_here(name, tensor)
        dtype = "" if name == "barrier" else str(tensor.dtype)
        launches, counted = self._lookout.launches, name not in ("send", "receive")
        number = launches.add(self.calls.name, name, tensor.numel(), dtype) if counted else launches.count
        what = name if not dtype else f"{name} of {tensor.numel()} {dtype.removeprefix('torch.')}"
        where = f"{what}, on rank {self.rank} of {self.world_size} over {self.transport}"
        with self._naming(where, number):
            self._begin()
            if self._whole and not tensor.numel():
                starts = []  # gloo's own reduce-scatter of nothing never ends
            works = [work for work in [start() for start in starts] if work is not None]
            launched = Launched(where, number, tuple(works))
            if works and self._whole:
                self._outstanding.add(launched)
        return WorkHandle(tensor, partial(self._wait, launched, messages=messages, peer=peer), finish)

    def _begin(self) -> None:
        """All ranks are here before NCCL connects them: there the host would wait for a missing one, without an end."""
        if self._whole and not self._has_begun:
            self._has_begun = True
            self._lookout.await_all("the first collective of a group")

    def _wait(self, launched: Launched, *, messages: bool, peer: int | None) -> None:
        with self._naming(launched.where, launched.number):
            if self.device.type != "cpu":  # the stream waits, and not this thread
                for work in launched.works:
                    work.wait()
                return
            watch = Watch(self._lookout, launched.number)
            meanwhile = self.check_progress if self._whole else watch
            began = time.perf_counter()
            if messages:
                self._messages.wait(launched.works, meanwhile)
            else:
                for work in launched.works:
                    wait_for_collective(work, meanwhile)
            watch.close()
            self._outstanding.remove(launched)
            waited = time.perf_counter() - began
            if peer is None:
                self._unknown_waited_s += waited
            else:
                self._waited_s[peer] += waited

    @contextmanager
    def _naming(self, where: str, number: int) -> Iterator[None]:
        """Names the collective in the errors of torch.distributed, and the rank at fault if one has told. Raises at
        once after one of them."""
        if self.fate.failures:
            raise CommunicationError(f"{where}: after a failed collective ({self.fate.failures[0]})")
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
            raise CommunicationError(self.fate.failures[0]) from None
        except BaseException as error:  # the handler of a signal has raised
            self._give_up(f"{where}: interrupted by {type(error).__name__}")
            raise

    def _give_up(self, failure: str) -> None:
        if self._gave_up:
            return
        self._gave_up = True
        self._lookout.end(f"gave up: {failure}", gave_up=True)
        self.fate.fail(failure)
        self._outstanding.forget()
        if self._gloo:
            break_connections(self._group, self.rank, self.world_size)

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


def _calls_of(communicator: TorchCommunicator | None) -> Calls:
    return Calls() if communicator is None else communicator.calls


def _division(result: Tensor, reduction: Reduction, divisor: int) -> Finish:
    """What an average still needs."""
    return partial(_divide, result, divisor) if reduction == Reduction.average else None


def _divide(result: Tensor, divisor: int) -> None:
    result /= divisor


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: of any dtype, those unknown to the backend too."""
    return _contiguous(tensor).view(-1).view(torch.uint8)


def _contiguous(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    return tensor
