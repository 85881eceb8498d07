"""A sample of a matrix of tests in which every pair of values is."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any, TypeVar

Case = TypeVar("Case", bound=tuple[Any, ...])


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Some of `cases`, always the same, such that each pair of values of two columns that any case has is in one."""

    def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
        return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}

    left = {case: pairs(case) for case in cases}
    missing = {pair for found in left.values() for pair in found}
    chosen: list[Case] = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen
