"""Seconds for which a program was held up by the other ranks of a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waited:
    """How long the caller of one communicator, or of several, was held up.

    A wait for several ranks is put down to the one that came last: had the others come sooner, nothing would have
    changed. So `total_s` is the time that was lost, and no time is counted twice. What a transport does beside a
    program that computes is no wait.

    Attributes:
        by_rank_s: by the rank that was waited for.
        unknown_s: where the transport does not tell for whom. Over torch.distributed that is every collective, and the
            time in which its bytes travel is part of it.
    """

    by_rank_s: tuple[float, ...]
    unknown_s: float = 0.0

    @staticmethod
    def none(world_size: int) -> Waited:
        """No wait."""
        return Waited((0.0,) * world_size)

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.by_rank_s) + self.unknown_s

    def __add__(self, other: Waited) -> Waited:
        by_rank = tuple(a + b for a, b in zip(self.by_rank_s, other.by_rank_s, strict=True))
        return Waited(by_rank, self.unknown_s + other.unknown_s)

    def __sub__(self, other: Waited) -> Waited:
        return self + other.times(-1.0)

    def times(self, factor: float) -> Waited:
        """All times multiplied."""
        return Waited(tuple(each * factor for each in self.by_rank_s), self.unknown_s * factor)

    def in_group(self, ranks: Sequence[int], world_size: int) -> Waited:
        """The same by rank of a larger group, in which this one's ranks are `ranks`."""
        by_rank = [0.0] * world_size
        for rank, seconds in zip(ranks, self.by_rank_s, strict=True):
            by_rank[rank] = seconds
        return Waited(tuple(by_rank), self.unknown_s)
