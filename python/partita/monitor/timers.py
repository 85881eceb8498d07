"""Time that the phases of a step take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from partita.device.streams import Streams

_UNTIMED = nullcontext()
_Mark = tuple[str, Any, Any]  # a phase's name, begin and end


class PhaseTimers:
    """Sums the time spent in named phases, on a GPU that of the GPU; switched off, it costs one test per phase.

    Attributes:
        around: make what is entered around each phase, from its name; for those who watch a run.
    """

    def __init__(self, enabled: bool, streams: Streams) -> None:
        self._enabled = enabled
        self.around: list[Callable[[str], AbstractContextManager[object]]] = []
        self._streams = streams
        self._marks: list[_Mark] = []  # of the step under way
        self._ended: deque[list[_Mark]] = deque()  # of each step that is over, the oldest first

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
        if self._marks:
            self._ended.append(self._marks)
            self._marks = []

    def take(self) -> list[dict[str, float]]:
        """Milliseconds per phase, of each step that is done by now and was not taken before, the oldest first.

        Nobody waits: the last phase of a step ends after its outcome is known, with the update and the gathers. So on a
        GPU a step whose outcome is known may come with a later call.
        """
        taken: list[dict[str, float]] = []
        while self._ended and all(map(self._is_over, self._ended[0])):
            result: dict[str, float] = {}
            for name, start, end in self._ended.popleft():
                result[name] = result.get(name, 0.0) + self._streams.milliseconds(start, end)
            taken.append(result)
        return taken

    def _is_over(self, mark: _Mark) -> bool:
        return all(map(self._streams.is_reached, mark[1:]))
