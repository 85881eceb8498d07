"""Grids of ranks on simulated hosts, and plain arithmetic that an axis must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from partita.comm import (
    Communicator,
    ProcessGrid,
    Reduction,
    world_communicator,
)
from torch import Tensor

TIMEOUT = timedelta(seconds=30)


def connect_on(asked: str, hosts: str) -> Callable[..., Communicator]:
    """`world_communicator` on simulated hosts."""
    return partial(world_communicator, asked, TIMEOUT, host=hosts[dist.get_rank()])


@contextmanager
def grid_on(asked: str, hosts: str, pipe: int) -> Iterator[ProcessGrid]:
    """All leave together."""
    grid = ProcessGrid(connect_on(asked, hosts), pipe)
    yield grid
    grid.world.barrier()
    grid.close()


def process_groups() -> int:
    """Those that torch.distributed knows in this process, the default group too."""
    return len(dist.distributed_c10d._world.pg_map)


class Axis:
    """Checks an axis against plain arithmetic over the ranks that must be on it."""

    def __init__(self, communicator: Communicator, ranks: list[int], rank: int) -> None:
        self.communicator, self.ranks, self.rank = communicator, ranks, rank
        self.place = ranks.index(rank)
        assert (communicator.rank, communicator.world_size) == (self.place, len(ranks))
        self._pending: list[tuple[str, Any, Tensor, Tensor]] = []

    @staticmethod
    def values(rank: int, numel: int, seed: int) -> Tensor:
        """What a rank contributes: small integers, whose sums are exact."""
        return torch.randint(-50, 50, (numel,), generator=torch.Generator().manual_seed(97 * seed + rank)).float()

    def launch(self, numel: int, seed: int) -> None:
        """Starts every collective; `finish` checks them."""
        c, n = self.communicator, len(self.ranks)
        every = torch.stack([self.values(r, numel, seed) for r in self.ranks])
        total = every.sum(0)
        buffers = [c.empty(numel, torch.float32).copy_(every[self.place]) for _ in range(4)]
        own = slice(self.place * (numel // n), (self.place + 1) * (numel // n))
        gathered = torch.cat([slices[i] for i, slices in enumerate(every.view(n, n, -1))])
        self._expect("sum", c.all_reduce(buffers[0]), buffers[0], total)
        self._expect("max", c.all_reduce(buffers[1], Reduction.max), buffers[1], every.max(0).values)
        self._expect("scattered", c.reduce_scatter(buffers[2], Reduction.average), buffers[2][own], total[own] / n)
        self._expect("gathered", c.all_gather(buffers[3]), buffers[3], gathered)
        for root in range(n):
            buffer = every[self.place].clone()
            self._expect(f"from {root}", c.broadcast(buffer, root), buffer, every[root])
        following, before = (self.place + 1) % n, (self.place - 1) % n
        received = torch.zeros(numel)
        sent = every[self.place].clone()
        self._expect("sent", c.send(sent, following), sent, every[self.place])
        self._expect("received", c.recv(received, before), received, every[before])

    def finish(self) -> None:
        """Waits for what `launch` began."""
        pending, self._pending = self._pending, []
        for _, handle, _, _ in pending:
            handle.wait()
        for what, _, result, expected in pending:
            assert torch.equal(result, expected), (what, self.ranks, self.rank)

    def _expect(self, what: str, handle: Any, result: Tensor, expected: Tensor) -> None:
        self._pending.append((what, handle, result, expected))
