"""Time that the phases of a step take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from partita.device.streams import Streams

_UNTIMED = nullcontext()


class PhaseTimers:
    """Sums the time spent in named phases, on a GPU that of the GPU; switched off, it costs one test per phase.

    Attributes:
        around: make what is entered around each phase, from its name; for those who watch a run.
    """

    def __init__(self, enabled: bool, streams: Streams) -> None:
        self._enabled = enabled
        self.around: list[Callable[[str], AbstractContextManager[object]]] = []
        self._streams = streams
        self._marks: list[tuple[str, Any, Any]] = []  # of the step under way
        self._ended: list[tuple[str, Any, Any]] = []  # of steps that are over

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Adds the time of the block to `name`."""
        if self.around:
            return self._watched(name)
        return self._timed(name) if self._enabled else _UNTIMED

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for enter in self.around:
                stack.enter_context(enter(name))
            stack.enter_context(self._timed(name) if self._enabled else _UNTIMED)
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._streams.mark()
        try:
            yield
        finally:
            self._marks.append((name, start, self._streams.mark()))

    def end_step(self) -> None:
        """What comes next belongs to another step."""
        self._ended += self._marks
        self._marks.clear()

    def take(self) -> dict[str, float]:
        """Milliseconds per phase of the steps that have ended since the last call.

        Once the outcome of the last of them is known, that takes no wait: no mark comes after it.
        """
        result: dict[str, float] = {}
        for name, start, end in self._ended:
            result[name] = result.get(name, 0.0) + self._streams.milliseconds(start, end)
        self._ended.clear()
        return result
