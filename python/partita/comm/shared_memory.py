"""Collectives between the processes of one host, in memory that all of them can read (see `group.h`)."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from partita._core import Collective, CommunicationError, Element, Operation, Reduction, SharedMemoryGroup, Transfer
from partita.comm.calls import why_ending, why_leaving
from partita.comm.communicator import Communicator, Handle
from partita.comm.waited import Waited
from partita.device import kernels

ELEMENTS = {
    torch.float32: Element.f32,
    torch.float16: Element.f16,
    torch.bfloat16: Element.bf16,
    torch.float64: Element.f64,
}


class GroupHandle:
    """A collective, a send or a receive; keeps the tensor alive until it has been waited for."""

    def __init__(self, pending: Operation | Transfer, tensor: Tensor) -> None:
        self._pending = pending
        self._tensor: Tensor | None = tensor

    def wait(self) -> None:
        """Returns when the tensor has its result and may be written again.

        Raises:
            CommunicationError: a rank died, hangs, or called something else; names it and the collective.
        """
        if self._tensor is not None:
            self._pending.wait()
            self._tensor = None


class SharedMemoryCommunicator(Communicator):
    """The ranks of one host. Buffers of `empty()` are reduced and gathered where they are; others are copied first.

    Sums are formed in fp32, in rank order, and rounded once: results depend neither on timing nor on how buffers are
    cut.

    A forked child (a data-loading worker, say) shares the parent's buffers: it sees them change, and what it writes
    there, the parent sees. It is no member of the group.
    """

    transport = "shared memory"
    shares_memory = True

    def __init__(self, group: SharedMemoryGroup) -> None:
        self._open_group: SharedMemoryGroup | None = group
        self.rank = group.rank
        self.world_size = group.world_size
        weakref.finalize(self, _leave_at_the_end, group)

    @property
    def _group(self) -> SharedMemoryGroup:
        if self._open_group is None:
            raise CommunicationError(f"rank {self.rank} has closed its group over shared memory")
        return self._open_group

    @property
    def committed_bytes(self) -> int:
        """Physical memory of this rank's buffers."""
        return self._group.committed_bytes

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=self.device)
        return torch.frombuffer(self._group.allocate(numel * dtype.itemsize), dtype=dtype)

    def mapped(self, numel: int, dtype: torch.dtype) -> Tensor:
        multiple = self.mapped_multiple(dtype)
        if numel % (self.world_size * multiple):
            raise ValueError(
                f"a mapped buffer of {numel} elements does not divide among {self.world_size} ranks into whole pages: "
                f"of {dtype}, a slice has a multiple of {multiple} elements"
            )
        if numel == 0:
            return torch.empty(0, dtype=dtype, device=self.device)
        return torch.frombuffer(self._group.map_slices(numel // self.world_size * dtype.itemsize), dtype=dtype)

    def mapped_multiple(self, dtype: torch.dtype) -> int:
        return mmap.PAGESIZE // dtype.itemsize

    def all_reduce(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self._launch(Collective.all_reduce, buffer, _summable(buffer), reduction=reduction)

    def reduce_scatter(self, buffer: Tensor, reduction: Reduction = Reduction.sum) -> Handle:
        return self._launch(Collective.reduce_scatter, buffer, _summable(buffer), reduction=reduction)

    def all_gather(self, buffer: Tensor) -> Handle:
        self.slice_numel(buffer)  # in elements: bytes may divide where elements do not
        return self._launch(Collective.all_gather, buffer, _element(buffer))

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        return self._launch(Collective.broadcast, tensor, _element(tensor), root=root)

    def send(self, tensor: Tensor, destination: int) -> Handle:
        self._require_here("send", tensor)
        element = _element(tensor)
        transfer = self._group.send(kernels.address(tensor), _count(tensor, element), element, destination)
        return GroupHandle(transfer, tensor)

    def recv(self, tensor: Tensor, source: int) -> Handle:
        self._require_here("recv", tensor)
        element = _element(tensor)
        transfer = self._group.receive(kernels.address(tensor), _count(tensor, element), element, source)
        return GroupHandle(transfer, tensor)

    def barrier(self) -> None:
        self._group.barrier(self.calls.name)

    def waited(self) -> Waited:
        return Waited(tuple(ns * 1e-9 for ns in self._group.waited_ns()))

    def close(self) -> None:
        self.leave(why_leaving())

    def leave(self, reason: str) -> None:
        if self._open_group is not None:
            self._open_group.close(reason)
            self._open_group = None  # the peers' memory is unmapped when the last handle has gone, too

    def _launch(
        self,
        collective: Collective,
        tensor: Tensor,
        element: Element,
        *,
        reduction: Reduction = Reduction.sum,
        root: int = 0,
    ) -> Handle:
        self._require_here(collective.name, tensor)
        numel = _count(tensor, element)
        operation = self._group.launch(
            collective, kernels.address(tensor), numel, element, reduction, root, self.calls.name
        )
        return GroupHandle(operation, tensor)


def _leave_at_the_end(group: SharedMemoryGroup) -> None:
    """Peers that wait learn why; who has left before does nothing."""
    group.close(why_ending())


def _element(tensor: Tensor) -> Element:
    return ELEMENTS.get(tensor.dtype, Element.byte)


def _summable(buffer: Tensor) -> Element:
    if buffer.dtype not in ELEMENTS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in ELEMENTS)
        raise TypeError(f"a buffer of {buffer.dtype} cannot be reduced over shared memory, only {names}")
    return ELEMENTS[buffer.dtype]


def _count(tensor: Tensor, element: Element) -> int:
    return tensor.nbytes if element == Element.byte else tensor.numel()
