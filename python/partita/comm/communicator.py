"""What the engine asks of a transport. Buffers are flat; every collective works in place and returns a handle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from partita.memory import flat_buffer


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Returns when the result is in the buffer; a second call returns at once."""


class Done:
    """The handle of a collective that needed no time."""

    def wait(self) -> None:
        """Returns at once."""


class Communicator(ABC):
    """The ranks of one group. All of them must issue the same collectives in the same order.

    A buffer's elements are divided evenly: the slice of rank r is [r * n, (r + 1) * n), with n = numel / world_size.
    """

    rank: int
    world_size: int

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat buffer that this transport can work on in place; its content is undefined."""
        return flat_buffer(numel, dtype)

    def slice_of(self, buffer: Tensor) -> Tensor:
        """This rank's slice of a buffer, as a view."""
        numel = buffer.numel() // self.world_size
        return buffer[self.rank * numel : (self.rank + 1) * numel]

    @abstractmethod
    def all_reduce(self, buffer: Tensor) -> Handle:
        """Every rank's buffer becomes the sum of all ranks' buffers."""

    @abstractmethod
    def reduce_scatter(self, buffer: Tensor) -> Handle:
        """This rank's slice becomes the sum of all ranks' buffers there; the rest becomes undefined."""

    @abstractmethod
    def all_gather(self, buffer: Tensor) -> Handle:
        """Every slice becomes what its rank has there."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        """A contiguous tensor of any dtype becomes rank `root`'s."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when all ranks have called it."""


class SingleProcess(Communicator):
    """A group of one: every collective is done before it starts."""

    rank = 0
    world_size = 1

    def all_reduce(self, buffer: Tensor) -> Handle:
        return Done()

    def reduce_scatter(self, buffer: Tensor) -> Handle:
        return Done()

    def all_gather(self, buffer: Tensor) -> Handle:
        return Done()

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        return Done()

    def barrier(self) -> None:
        return
