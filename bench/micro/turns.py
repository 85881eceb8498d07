"""Ours and others timed in turns, so that all see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

ROUNDS = 15
Action = Callable[[], object]


def time_in_turns(benchmark: Any, nbytes: int, ours: Action, others: dict[str, Action]) -> None:
    """Times `ours` as the benchmark and the others before each round; rows go into the table at the end of the run."""
    times: dict[str, list[float]] = {name: [] for name in others}

    def set_up() -> None:
        for name, action in others.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)

    set_up()
    ours()
    for row in times.values():
        row.clear()
    benchmark.pedantic(ours, setup=set_up, rounds=ROUNDS)
    benchmark.extra_info["bytes"] = nbytes
    benchmark.extra_info["others"] = times
