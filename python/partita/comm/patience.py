"""Waiting for works of gloo so that a signal ends the wait: `Work.wait()` alone returns to Python when it is over.

[Note: two kinds of works] A collective's work may be waited for in slices of time. A message's (a send, a receive) may
not: its timeout closes all connections of the group. So messages are waited for on another thread, and the caller waits
for the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue

import torch.distributed as dist

SLICE = timedelta(milliseconds=50)

Meanwhile = Callable[[], None]  # called between slices; may raise


def wait_for_collective(work: dist.Work, meanwhile: Meanwhile) -> None:
    """Returns when the work is done; raises what the work raises, or `meanwhile`, or a signal's handler."""
    while True:
        try:
            work.wait(SLICE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises what has happened, if that was no timeout of the slice
                return
        meanwhile()


class MessageWaits:
    """The threads that wait for messages: as many as there are callers at the same time."""

    def __init__(self) -> None:
        self._idle: list[_Waiter] = []

    def wait(self, works: Sequence[dist.Work], meanwhile: Meanwhile) -> None:
        """As `wait_for_collective`, for the works of one or several messages."""
        waiter = self._idle.pop() if self._idle else _Waiter()
        done = threading.Event()
        outcome: list[BaseException | None] = []
        waiter.tasks.put((works, outcome, done))
        while not done.wait(SLICE.total_seconds()):
            meanwhile()
        self._idle.append(waiter)
        if outcome[0] is not None:
            raise outcome[0]

    def close(self) -> None:
        """Ends the threads that wait for nothing."""
        while self._idle:
            self._idle.pop().tasks.put(None)


class _Waiter:
    """One thread, which waits for one message after another."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Sequence[dist.Work], list[BaseException | None], threading.Event] | None]
        self.tasks = SimpleQueue()
        # A daemon: one whose message never comes must not hold up the end of the program.
        threading.Thread(target=self._run, name="partita-messages", daemon=True).start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            works, outcome, done = task
            try:
                for work in works:
                    work.wait()
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)
            done.set()
            del task, works, outcome, done  # the tensors are the caller's
