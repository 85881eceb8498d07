"""Signals that ask a run to save and end: noted when they come, acted on after a step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger("partita")

ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""What a cluster sends some time before it takes the machine back."""


class Signals:
    """Takes SIGTERM and SIGUSR1 between `open()` and `close()`, in place of what they would do to the process.

    A handler that the program has set before is called too. A process that is forked meanwhile, such as a worker that
    loads data, does what it would do without this.
    """

    def __init__(self) -> None:
        self._came: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self._is_open = False
        self._handler: Callable[[int, FrameType | None], None] = self._take  # one object, to be known again

    @property
    def came(self) -> bool:
        """Whether there was one that `forget()` has not ended."""
        return self._came is not None

    @property
    def name(self) -> str:
        """Of the first one, such as "SIGTERM"; empty: none came to this process."""
        return "" if self._came is None else self._came.name

    def open(self) -> None:
        """From here on signals are noted. Only the main thread of Python may set handlers: elsewhere nothing is."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "the engine was made outside of the main thread, where Python sets no signal handlers: SIGTERM and "
                "SIGUSR1 do not save a checkpoint on this rank"
            )
            return
        for number in ENDING:
            previous = signal.getsignal(number)
            if previous is None:  # set by a C library, which could not be given back
                logger.warning("%s has a handler that is not of Python, and does not save a checkpoint", number.name)
                continue
            self._previous[number] = previous
            signal.signal(number, self._handler)
        self._is_open = True

    def forget(self) -> None:
        """What came is done with."""
        self._came = None

    def close(self) -> None:
        """Signals do again what they did before. One that came and was not acted on does it now; a second call does
        nothing."""
        if not self._is_open:
            return
        self._is_open = False
        if os.getpid() != self._owner or threading.current_thread() is not threading.main_thread():
            return  # the handler passes signals on
        for number, previous in self._previous.items():
            if signal.getsignal(number) is self._handler:
                signal.signal(number, previous)
        came, self._came = self._came, None
        if came is not None and self._previous[came] == signal.SIG_DFL:
            signal.raise_signal(came)

    def _take(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        previous = self._previous.get(came, signal.SIG_DFL)
        is_taken = self._is_open and os.getpid() == self._owner
        if is_taken and self._came is None:
            self._came = came
        if callable(previous):
            previous(number, frame)
        elif not is_taken and previous == signal.SIG_DFL:
            signal.signal(came, signal.SIG_DFL)
            os.kill(os.getpid(), came)
