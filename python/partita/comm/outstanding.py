"""Collectives under way over torch.distributed; where a stream waits and not the host, those not known to be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from partita._core import CommunicationError
from partita.comm.lookout import LONG_WAIT_S, Lookout

Finish = Callable[[], None] | None
QUERIES_PER_LAUNCH = 2  # each asks a device; more than one, so that the list becomes shorter again
PAUSE_S = 0.002
LONGEST_GAP_S = 0.5  # between two looks of one wait; what is longer was no wait of the host


class WorkHandle:
    """Works of torch.distributed that form one collective; keeps alive what they read and write.

    Args:
        wait: waits for the works; raises CommunicationError.
        finish: what is left to do then.
    """

    def __init__(self, keep: Tensor, wait: Callable[[], None], finish: Finish) -> None:
        self._keep: Tensor | None = keep
        self._wait: Callable[[], None] | None = wait
        self._finish = finish

    def wait(self) -> None:
        """Returns when the works are done and the result is in the buffer.

        Raises:
            CommunicationError: torch.distributed says that they failed, or another rank has ended or is in another
                collective; names the collective and this rank, or both calls.
        """
        if self._wait is None:
            return
        self._wait()
        self._wait = None
        finish, self._finish, self._keep = self._finish, None, None
        if finish is not None:
            finish()


@dataclass(frozen=True, eq=False)
class Launched:
    """A collective, a send or a receive that was launched.

    where: in words, for errors. number: among the collectives of the communicator.
    """

    where: str
    number: int
    works: tuple[dist.Work, ...]

    def is_done(self) -> bool:
        """Whether all is done; does not wait.

        Raises:
            CommunicationError: it has failed.
        """
        for work in self.works:
            if not work.is_completed():
                return False
            try:
                work.wait()  # raises what has happened; nothing is left to wait for
            except torch.AcceleratorError:  # of the device: no other rank is at fault
                raise
            except RuntimeError as error:
                raise CommunicationError(f"{self.where}: {error}") from None
        return True


class Outstanding:
    """What a communicator has launched, in order, without what is known to be done.

    [Note: waits of the host] Over NCCL a collective is a kernel, and a wait for it is one of a stream: neither raises.
    Who learns of a rank that does not come is a host that waits for its device, for the outcome of a step or an
    agreement. It looks here every now and then (`check`). Only the oldest collective counts: those behind it may wait
    for it alone. A device that is slow, and one whose collective waits for another rank, look alike; so a collective is
    only given up when the host has waited for `timeout_s` while it was the oldest, or when another rank has told that
    it does not come.
    """

    def __init__(self, lookout: Lookout, timeout_s: float) -> None:
        self._lookout = lookout
        self._timeout_s = timeout_s
        self._launched: deque[Launched] = deque()
        self._oldest: Launched | None = None  # at the last look
        self._waited_s = 0.0  # by the host, for that one
        self._checked = self._looked = time.monotonic()
        self._is_long = False

    def add(self, launched: Launched) -> None:
        """Notes a launch, and forgets a few that are done.

        Raises:
            CommunicationError: one of those has failed.
        """
        self._launched.append(launched)
        for _ in range(QUERIES_PER_LAUNCH):
            if not self._forget_oldest():
                return

    def check(self) -> bool:
        """Called while the host waits, at least every LONGEST_GAP_S. Returns whether all are done.

        Raises:
            CommunicationError: one has failed, or the oldest waits in vain: another rank has told why, or it is late.
        """
        now = time.monotonic()
        since, self._checked = now - self._checked, now
        while self._forget_oldest():
            pass
        oldest = self._launched[0] if self._launched else None
        if oldest is not self._oldest:
            self._oldest, self._waited_s, self._looked = oldest, 0.0, now
            self._end_long()
        elif oldest is not None:
            self._waited_s += min(since, LONGEST_GAP_S)
            self._look(oldest, now)
        return oldest is None

    def settle(self, patience_s: float) -> bool:
        """Waits until all are done; false: they are not after `patience_s`, one has failed or waits in vain."""
        deadline = time.monotonic() + patience_s
        try:
            while not self.check():
                if time.monotonic() > deadline:
                    return False
                time.sleep(PAUSE_S)
        except RuntimeError:
            return False
        return True

    def remove(self, launched: Launched) -> None:
        """The host has waited for this one: some works of gloo only say then that they are done."""
        with suppress(ValueError):
            self._launched.remove(launched)

    def forget(self) -> None:
        """Nobody waits for any of them any more."""
        self._launched.clear()
        self._oldest = None

    def _look(self, oldest: Launched, now: float) -> None:
        is_late = self._waited_s > self._timeout_s
        if now - self._looked < LONG_WAIT_S and not is_late:
            return
        self._looked, self._is_long = now, True
        if why := self._lookout.look(oldest.number):
            raise CommunicationError(f"{oldest.where}: {why}")
        if is_late:
            raise CommunicationError(
                f"{oldest.where}: not done, and this rank's host has waited for it for {self._waited_s:.1f} s "
                f"(comm.timeout_seconds); {self._lookout.what_others_do(oldest.number)}"
            )

    def _end_long(self) -> None:
        if self._is_long:
            self._is_long = False
            self._lookout.go_on()

    def _forget_oldest(self) -> bool:
        if not self._launched or not self._launched[0].is_done():
            return False
        self._launched.popleft()
        return True
