"""Records on their way from the loop that trains to the sinks.

[Note: out of the way] The loop appends a record to a queue, which takes no lock. A thread takes what has come in the
meantime, once per second, and writes it. So a slow disk or network holds up that thread. A sink that fails is told of
once, and gets nothing more. The run goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from partita.monitor.records import Record
from partita.monitor.sink import Sink

logger = logging.getLogger("partita")

INTERVAL_S = 1.0
MOST_WAITING = 100_000  # records; if sinks hang, the oldest ones are dropped
PATIENCE_S = 120.0  # at the end


class RecordWriter:
    """Hands records to sinks, in a thread of its own.

    Args:
        sinks: owned from here on.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._work = _Work(sinks)
        # A program that ends without destroy() has its records written all the same.
        self._end = weakref.finalize(self, self._work.finish)

    def put(self, record: Record) -> None:
        """Queues a record; never waits."""
        self._work.waiting.append(record)

    def go_on_from(self, step: int, samples: int) -> None:
        """What comes next follows this step, see `Sink`."""
        self._work.waiting.append((step, samples))

    def close(self) -> None:
        """All that was queued is written, unless a sink hangs, and the sinks are closed."""
        self._end()


class _Work:
    """What the thread has. It does not know the writer, which so can be collected."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.waiting: deque[Record | tuple[int, int]] = deque(maxlen=MOST_WAITING)
        self._sinks = list(sinks)
        self._ends = threading.Event()
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._run, name="partita monitor", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """The thread writes what is left, and ends."""
        if os.getpid() != self._owner:  # a child that was forked has no such thread
            return
        self._ends.set()
        if threading.current_thread() is self._thread:  # where Python happened to collect the writer
            return
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            names = ", ".join(sink.name for sink in self._sinks)
            logger.warning(f"monitor: {names} did not end within {PATIENCE_S:g} s; the last values may be missing")

    def _run(self) -> None:
        while not self._ends.wait(INTERVAL_S):
            self._drain()
        self._drain()
        for sink in list(self._sinks):
            self._attempt(sink, sink.close)

    def _drain(self) -> None:
        batch: list[Record] = []
        while self.waiting:
            item = self.waiting.popleft()
            if isinstance(item, Record):
                batch.append(item)
                continue
            self._write(batch)
            batch = []
            for sink in list(self._sinks):
                self._attempt(sink, sink.go_on_from, *item)
        self._write(batch)

    def _write(self, batch: list[Record]) -> None:
        for sink in list(self._sinks) if batch else ():
            self._attempt(sink, sink.write, batch)

    def _attempt(self, sink: Sink, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:
            self._sinks.remove(sink)
            said = str(error) or type(error).__name__
            logger.warning(f"monitor: {sink.name} has failed and gets no more values; training goes on ({said})")
