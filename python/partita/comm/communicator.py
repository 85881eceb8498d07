"""What the engine asks of a transport. Buffers are flat; every collective works in place and returns a handle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from partita._core import Reduction
from partita.comm.calls import Calls
from partita.comm.waited import Waited
from partita.device.memory import HOST, flat_buffer
from partita.device.polling import read_back, sent_to


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Returns when the result is in the buffer; on a GPU at once, and the current stream waits. A second call does
        nothing."""


class Done:
    """The handle of a collective that needed no time."""

    def wait(self) -> None:
        """Returns at once."""


class Communicator(ABC):
    """The ranks of one group. All of them must issue the same collectives in the same order.

    A collective may run after its call and reads and writes the buffer until its handle has been waited for. On a GPU
    it begins after what the current stream has been given by the call.

    A buffer's elements are divided evenly: the slice of rank r is [r * n, (r + 1) * n), with n = numel / world_size.
    """

    rank: int
    world_size: int
    transport: str  # what carries the bytes, for people
    device: torch.device = HOST  # of its buffers
    shares_memory: bool = False  # whether mapped() returns a buffer
    sums_in_fp32: bool = True  # whether sums of 16-bit values are rounded once

    @cached_property
    def calls(self) -> Calls:
        """Where the program is; the communicators of one grid share it."""
        return Calls()

    def check_progress(self) -> None:  # noqa: B027  most transports have nothing to look at
        """Called again and again while the host waits for its device.

        Raises:
            CommunicationError: a collective has failed, or waits in vain; names it and this rank.
        """

    def to_host(self, tensor: Tensor) -> Tensor:
        """The values of a small tensor on the host, which waits for them and for collectives before them.

        Raises:
            CommunicationError: as `check_progress`.
        """
        return read_back(tensor, self.check_progress)

    def to_device(self, values: Tensor) -> Tensor:
        """Small values of the host where the buffers are; the host does not wait."""
        return sent_to(self.device, values)

    def connect_pairs(self, pairs: Sequence[tuple[int, int]]) -> None:  # noqa: B027  most are connected
        """Messages will go from the first rank of each pair to the second one. A collective: all give the same pairs.

        Without it the first message may hold up the host until the receiver takes it.
        """

    def call_of_all(self, name: str) -> AbstractContextManager[None]:
        """In this block the program is in `name`, an engine call that all ranks make and that is rare.

        Raises:
            CommunicationError: another rank is in another call. Some transports know it here, others in a collective.
        """
        return self.calls.inside(name)

    def come_together(self, what: str) -> None:  # noqa: B027  some transports compare collectives
        """Returns when all ranks are about to do this; for what is rare.

        Raises:
            CommunicationError: another rank does something else.
        """

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer that this transport can work on in place; its content is undefined."""
        return flat_buffer(numel, dtype, self.device)

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """A flat buffer whose slices lie each in its rank's memory, and that all ranks see as one: what any of them
        writes is there for all. None where ranks share no memory. A collective.

        Its content is undefined. It stays as it is while this rank holds the tensor, also when others have dropped
        theirs, have closed the group or have died. The memory is free again when all ranks have dropped theirs and
        closed the group, not before.

        Raises:
            ValueError: the slices are no multiple of `mapped_multiple`.
        """
        return None

    def mapped_multiple(self, dtype: torch.dtype) -> int:
        """The number of elements in a slice of `mapped()` must be a multiple of this."""
        return 1

    def slice_of(self, buffer: Tensor) -> Tensor:
        """This rank's slice of a buffer, as a view.

        Raises:
            ValueError: the buffer does not divide evenly.
        """
        numel = self.slice_numel(buffer)
        return buffer[self.rank * numel : (self.rank + 1) * numel]

    def slice_numel(self, buffer: Tensor) -> int:
        """The elements of a slice.

        Raises:
            ValueError: the buffer does not divide evenly.
        """
        numel, rest = divmod(buffer.numel(), self.world_size)
        if rest:
            raise ValueError(
                f"a buffer of {buffer.numel()} elements does not divide evenly among {self.world_size} ranks"
            )
        return numel

    def slices(self, buffer: Tensor) -> list[Tensor]:
        """The slices of a buffer by rank, as views.

        Raises:
            ValueError: the buffer does not divide evenly.
        """
        numel = self.slice_numel(buffer)
        return [buffer[r * numel : (r + 1) * numel] for r in range(self.world_size)]

    def _require_here(self, call: str, tensor: Tensor) -> None:
        """Raises ValueError, before anything is sent, for a tensor in memory of another kind than the buffers'."""
        if tensor.device.type != self.device.type:
            where = "host memory" if self.device.type == "cpu" else f"memory of '{self.device.type}'"
            raise ValueError(
                f"{call}() of a tensor on '{tensor.device}', on rank {self.rank} of {self.world_size} over "
                f"{self.transport}: what it carries is in {where}"
            )

    def _check_rank(self, what: str, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{what} rank {rank}: the group has the ranks 0 to {self.world_size - 1}")

    @abstractmethod
    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        """Every rank's buffer becomes the reduction of all ranks' buffers."""

    @abstractmethod
    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        """This rank's slice becomes the reduction of all ranks' buffers there; the rest becomes undefined."""

    @abstractmethod
    def all_gather(self, buffer: Tensor) -> Handle:
        """Every slice becomes what its rank has there."""

    def all_gather_into(self, full: Tensor, shard: Tensor) -> Handle:
        """The slice of every rank r in `full`, a buffer of any memory, becomes the `shard` of rank r."""
        self.slice_of(full).copy_(shard)
        return self.all_gather(full)

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        """A contiguous tensor of any dtype becomes rank `root`'s."""

    @abstractmethod
    def send(self, tensor: Tensor, destination: int) -> Handle:
        """Sends a contiguous tensor of any dtype; it may change after the wait, which may last until the receiver's.

        Sends from one rank to another are received in their order. Some transports hold no more than 256 that are not
        received yet, and wait in the next.
        """

    @abstractmethod
    def recv(self, tensor: Tensor, source: int) -> Handle:
        """A contiguous tensor becomes what rank `source` sends, which has its dtype and number of elements.

        The handles of one source are waited for, and dropped, by one thread.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Returns when all ranks have called it."""

    def waited(self) -> Waited | None:
        """How long this rank's program has been held up by the others so far. None: the host does not know, as the wait
        is the GPU's."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Leaves the group: nothing can be called any more. Buffers stay valid, mapped ones too."""

    def leave(self, reason: str) -> None:
        """`close()`, with a reason for the ranks that wait for this one."""
        self.close()


class SingleProcess(Communicator):
    """A group of one: every collective is done before it starts."""

    rank = 0
    world_size = 1
    transport = "nothing: one process"

    def __init__(self, device: torch.device = HOST) -> None:
        self.device = device

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return Done()

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return Done()

    def all_gather(self, buffer: Tensor) -> Handle:
        return Done()

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        return Done()

    def send(self, tensor: Tensor, destination: int) -> Handle:
        raise ValueError(f"send() to rank {destination}: this process is alone")

    def recv(self, tensor: Tensor, source: int) -> Handle:
        raise ValueError(f"recv() from rank {source}: this process is alone")

    def barrier(self) -> None:
        return

    def waited(self) -> Waited:
        return Waited.none(1)

    def close(self) -> None:
        return
