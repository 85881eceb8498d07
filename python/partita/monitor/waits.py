"""Who waited for whom: in a step, as a report has it, and as a table of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.comm import Communicator, WaitRow, WaitsLedger, numbers_by_rank
from partita.monitor.records import StepWaits

TOLD_FROM_SHARE = 0.001  # of the time; below, who was waited for is noise


@dataclass(frozen=True)
class WaitTable:
    """Who waited for whom, in some stretch of time.

    Attributes:
        seconds: `seconds[waiter][awaited]`, where the transport tells; a wait for several ranks is put down to the one
            that came last. Over shared memory all waits are here; over torch.distributed those of a pipeline's
            messages are.
        unknown_s: by waiter, waits for ranks that the transport does not tell. Over torch.distributed they have the
            time in them in which bytes travel.
        elapsed_s: by rank, the length of the time.
    """

    seconds: tuple[tuple[float, ...], ...]
    unknown_s: tuple[float, ...]
    elapsed_s: tuple[float, ...]

    @staticmethod
    def of(rows: Sequence[WaitRow]) -> WaitTable:
        """The table of all ranks' rows, in their order."""
        return WaitTable(
            tuple(row.waited.by_rank_s for row in rows),
            tuple(row.waited.unknown_s for row in rows),
            tuple(row.elapsed_s for row in rows),
        )

    @property
    def waited_s(self) -> tuple[float, ...]:
        """How long each rank waited in all."""
        return tuple(sum(row) + unknown for row, unknown in zip(self.seconds, self.unknown_s, strict=True))

    @property
    def awaited_s(self) -> tuple[float, ...]:
        """How long others waited for each rank, where the transport tells."""
        return tuple(sum(column) for column in zip(*self.seconds, strict=True))

    @property
    def slowest_rank(self) -> int | None:
        """As in `StepWaits`."""
        return _slowest(self.awaited_s, self.waited_s, sum(self.elapsed_s))

    @property
    def waited_share(self) -> float:
        """As in `StepWaits`."""
        return _share(self.waited_s, sum(self.elapsed_s))

    def __str__(self) -> str:
        ranks = range(len(self.seconds))
        has_unknown = any(self.unknown_s)
        unknown = ["for any"] if has_unknown else []
        head = ["waited, ms", *(f"for rank {r}" for r in ranks), *unknown, "in all", "share"]
        rows = [
            [
                f"rank {r}",
                *("-" if s == r and not self.seconds[r][s] else _ms(self.seconds[r][s]) for s in ranks),
                *([_ms(self.unknown_s[r])] if has_unknown else []),
                _ms(self.waited_s[r]),
                f"{_share(self.waited_s[r : r + 1], self.elapsed_s[r]):.1%}",
            ]
            for r in ranks
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        slowest = "nobody waited long enough to tell" if self.slowest_rank is None else f"rank {self.slowest_rank}"
        return "\n".join([*lines, f"the slowest: {slowest}; {self.waited_share:.1%} of the time was lost to waiting"])


@dataclass(frozen=True)
class Waits:
    """Who waited for whom in a run.

    Attributes:
        last_step: from the decision about the last step but one to that about the last one; None: no step was taken.
        run: since the engine began.
        transport: what carries the bytes, for people.
    """

    last_step: WaitTable | None
    run: WaitTable | None
    transport: str

    def __str__(self) -> str:
        if self.run is None:
            return f"who waits for whom is not known over {self.transport}"
        parts = [("the run", self.run)]
        if self.last_step is not None:
            parts.insert(0, ("the last step", self.last_step))
        return "\n\n".join(f"{name}, over {self.transport}\n{table}" for name, table in parts)


def gather_waits(world: Communicator, ledger: WaitsLedger | None) -> Waits:
    """Who waited for whom, from what each rank knows. A collective."""
    if ledger is None or not ledger.is_known:
        return Waits(None, None, world.transport)
    last_step, run = ledger.last_step.numbers(), ledger.run.numbers()
    rows = numbers_by_rank(world, last_step + run)
    table = WaitTable.of([WaitRow.of(row[: len(last_step)]) for row in rows])
    return Waits(
        table if any(table.elapsed_s) else None,
        WaitTable.of([WaitRow.of(row[len(last_step) :]) for row in rows]),
        world.transport,
    )


def step_waits(sums: Sequence[float]) -> StepWaits | None:
    """What ranks lost in a step, from the sum of what they gave (see `WaitsLedger.take`); None: nothing is known."""
    if not sums:
        return None
    elapsed, *rest = sums
    awaited, waited = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return StepWaits(_slowest(awaited, waited, elapsed), _share(waited, elapsed))


def _slowest(awaited: Sequence[float], waited: Sequence[float], elapsed: float) -> int | None:
    """The rank that was waited for longest. Where most waits do not tell for whom: the rank that waited least."""
    if _share(waited, elapsed) < TOLD_FROM_SHARE:
        return None
    if 2 * sum(awaited) >= sum(waited):
        return max(range(len(awaited)), key=awaited.__getitem__)
    return min(range(len(waited)), key=waited.__getitem__)


def _share(waited: Sequence[float], elapsed: float) -> float:
    return min(1.0, sum(waited) / elapsed) if elapsed > 0 else 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
