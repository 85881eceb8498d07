"""How long this rank was held up by other ranks, since its communicators began and in each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from partita.comm.grid import ProcessGrid
from partita.comm.waited import Waited


@dataclass(frozen=True)
class WaitRow:
    """What one rank lost in some stretch of time.

    Attributes:
        elapsed_s: the length of that time, seconds.
        waited: what the rank was held up by others, by their rank in the world.
    """

    elapsed_s: float
    waited: Waited

    def numbers(self) -> list[float]:
        """The row as `2 + world size` numbers, the reverse of `of`."""
        return [self.elapsed_s, self.waited.unknown_s, *self.waited.by_rank_s]

    @staticmethod
    def of(numbers: Sequence[float]) -> WaitRow:
        """A row from its numbers."""
        return WaitRow(numbers[0], Waited(tuple(numbers[2:]), numbers[1]))


class WaitsLedger:
    """What this rank lost in each step, and in the run so far.

    A step lasts here from one decision about a step to the next one: its numbers travel with the sums from which the
    step is decided, and need no collective of their own. So the wait in the reduction of these sums, and waits for
    gathered parameters, belong to the step that follows.

    Attributes:
        is_known: whether the transport knows who waits.
        slots: how many numbers `take()` gives; 0: nothing is known, or this rank is alone.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        self._rank, self._world_size = grid.world.rank, grid.world.world_size
        self.is_known = grid.waited() is not None
        self.slots = 1 + 2 * self._world_size if self.is_known and self._world_size > 1 else 0
        self._began = self._before = self._last = self._now()

    def take(self) -> list[float]:
        """A step is decided. Returns what this rank adds to the step's sums: the seconds of the step, those for which
        this rank was held up by each rank, and, at this rank's own place, those that it was held up in all."""
        self._before, self._last = self._last, self._now()
        row = _between(self._before, self._last)
        own = [0.0] * self._world_size
        own[self._rank] = row.waited.total_s
        return [row.elapsed_s, *row.waited.by_rank_s, *own]

    @property
    def last_step(self) -> WaitRow:
        """What this rank lost in the last step; all zero before the first one."""
        return _between(self._before, self._last)

    @property
    def run(self) -> WaitRow:
        """What this rank has lost since the ledger began."""
        return _between(self._began, self._now())

    def _now(self) -> WaitRow:
        waited = self._grid.waited() if self.is_known else None
        return WaitRow(time.perf_counter(), waited or Waited.none(self._world_size))


def _between(before: WaitRow, after: WaitRow) -> WaitRow:
    return WaitRow(after.elapsed_s - before.elapsed_s, after.waited - before.waited)
