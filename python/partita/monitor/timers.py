"""Wall-clock time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Sums the time spent in named phases; switched off, it costs one test per phase."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`."""
        if not self._enabled:
            yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Milliseconds per phase since the last call."""
        result = {name: seconds * 1e3 for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return result
