"""Which layers are together in a stage: contiguous runs, as even as may be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from partita.pipeline.schedule import ScheduleError


def balanced(weights: Sequence[float], parts: int) -> list[range]:
    """Contiguous runs of items, none of them empty, whose largest sum is as small as may be.

    Of all such, the sums differ as little as may be (the sum of their squares is the smallest).

    Args:
        weights: of the items, from 0 on: numbers of parameters, or times.

    Raises:
        ScheduleError: there are fewer items than parts, or a weight is negative.
    """
    if not 1 <= parts <= len(weights):
        raise ScheduleError(f"{len(weights)} layers do not make {parts} stages: each stage has at least one layer")
    if any(not weight >= 0 for weight in weights):
        raise ScheduleError(f"weights of layers are numbers from 0 on: {list(weights)}")
    sums = [0, *accumulate(weights)]
    limit = _smallest_maximum(sums, parts)
    # Of the first items up to `end`, in one part more for each round: the smallest sum of squares.
    best = [0.0, *([inf] * len(weights))]
    begins: list[list[int]] = []  # of the last part, by round and end
    for _ in range(parts):
        row, where = [inf] * len(sums), [0] * len(sums)
        for end in range(1, len(sums)):
            for begin in range(end - 1, -1, -1):
                part = sums[end] - sums[begin]
                if part > limit:
                    break
                if best[begin] + part * part < row[end]:
                    row[end], where[end] = best[begin] + part * part, begin
        best = row
        begins.append(where)
    runs = []
    end = len(weights)
    for where in reversed(begins):
        runs.append(range(where[end], end))
        end = where[end]
    return runs[::-1]


def _smallest_maximum(sums: Sequence[float], parts: int) -> float:
    """The smallest largest sum of so many runs that are not empty."""
    items = len(sums) - 1
    # Of the first items up to `end`, in one part more for each round.
    best = list(sums)
    for part in range(2, parts + 1):
        row = [inf] * (items + 1)
        for end in range(part, items + 1):
            for begin in range(end - 1, part - 2, -1):
                last = sums[end] - sums[begin]
                if last >= row[end]:
                    break
                row[end] = min(row[end], max(best[begin], last))
        best = row
    return best[items]
