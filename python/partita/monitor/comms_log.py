"""What the collectives of a run carried, and how fast."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from partita.comm import Carried
from partita.device.streams import Streams

if TYPE_CHECKING:
    from partita.config.profile_keys import CommsLoggerConfig

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class CommsRow:
    """The operations of one kind and size.

    Attributes:
        operation: with the axis of the grid, such as "all_reduce (data)".
        nbytes: of each.
        seconds: of all together, from the launch until the program had waited for it. What computes meanwhile makes it
            longer.
        held_up_s: for which the program waited, of that. On a GPU it does not.
        ranks: the size of the group.
    """

    operation: str
    nbytes: int
    count: int
    seconds: float
    held_up_s: float
    ranks: int

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second of the program's tensors."""
        return self.nbytes * self.count / self.seconds if self.seconds else 0.0

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second that each rank must at least send or receive, whatever the algorithm; as NCCL's tests have
        it."""
        share = (self.ranks - 1) / self.ranks
        name = self.operation.partition(" ")[0]
        return self.algorithm_bandwidth * {"all_reduce": 2 * share, "reduce_scatter": share, "all_gather": share}.get(
            name, 1.0
        )


class CommsLog:
    """Adds up what communicators carry, by operation and size. On a GPU the times of an operation are read when it is
    over, which is looked at with each of the next ones: only `rows()` waits.

    Args:
        speaks: whether this rank prints lines.
    """

    def __init__(self, config: CommsLoggerConfig, streams: Streams, *, speaks: bool) -> None:
        self._config = config
        self._streams = streams
        self._prints_each = config.verbose and speaks
        self._rows: dict[tuple[str, int], CommsRow] = {}
        self._unread: deque[tuple[str, Carried]] = deque()

    def add(self, carried: Carried) -> None:
        """One more; the listener of a grid."""
        if not self._config.prof_all and not any(name.startswith(carried.operation) for name in self._config.prof_ops):
            return
        name = f"{carried.operation} ({carried.axis})"
        if self._config.debug and carried.call:
            name += f" in {carried.call}"
        self._unread.append((name, carried))
        self._read(waits=False)

    def rows(self) -> list[CommsRow]:
        """By the time that they took, the longest first. Waits for a GPU."""
        self._read(waits=True)
        return sorted(self._rows.values(), key=lambda row: -row.seconds)

    def _read(self, *, waits: bool) -> None:
        while self._unread and (waits or self._streams.is_reached(self._unread[0][1].marks[1])):
            name, carried = self._unread.popleft()
            seconds = self._streams.milliseconds(*carried.marks) * 1e-3
            one = CommsRow(name, carried.nbytes, 1, seconds, carried.done_s - carried.wait_s, carried.ranks)
            key = (name, carried.nbytes)
            row = self._rows.get(key)
            self._rows[key] = one if row is None else _added(row, one)
            if self._prints_each:
                logger.info(f"{name} of {_size(one.nbytes)}: {seconds * 1e3:.3f} ms, {_rate(one.algorithm_bandwidth)}")


def comms_text(rows: Iterable[CommsRow]) -> str:
    """Rows as a table."""
    head = ["operation", "bytes", "count", "total ms", "mean ms", "held up ms", "algorithm GB/s", "bus GB/s"]
    cells: list[list[str]] = [
        [
            row.operation,
            _size(row.nbytes),
            str(row.count),
            f"{row.seconds * 1e3:.2f}",
            f"{row.seconds * 1e3 / row.count:.3f}",
            f"{row.held_up_s * 1e3:.2f}",
            f"{row.algorithm_bandwidth / 1e9:.3f}",
            f"{row.bus_bandwidth / 1e9:.3f}",
        ]
        for row in rows
    ]
    return table_text(head, cells)


def table_text(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in [head, *rows]
    )


def _added(row: CommsRow, one: CommsRow) -> CommsRow:
    return replace(row, count=row.count + 1, seconds=row.seconds + one.seconds, held_up_s=row.held_up_s + one.held_up_s)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def _rate(per_s: Any) -> str:
    return f"{per_s / 1e9:.3f} GB/s"
