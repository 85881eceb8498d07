"""Communicators that fail together, and how a group is given up without its other ranks."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from partita.device.memory import HOST

ABORTED_WITHIN_S = 10.0  # after which the end of a program does not wait any longer
# Of a receive that nobody answers, see `break_connections`.
BREAK_TAG = 0x5A54
BREAK_TIMEOUT = timedelta(milliseconds=1)
_GIVEN_UP: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


class Fate:
    """What communicators of one job share that fail together.

    [Note: giving up over NCCL] A collective whose other ranks do not come is a kernel that runs for ever; aborting its
    communicator ends it. An abort frees memory of the device, which waits for the kernels of all communicators. So all
    of them are aborted at the same time, each on a thread of its own. The kernels end at once; the rest may wait until
    the other ranks of the host have let go, too (NCCL's proxy threads). So nobody waits for these threads but the end
    of the program, and that for a while.

    Attributes:
        failures: in words; after the first one no collective begins.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._groups: list[weakref.ref[dist.ProcessGroup]] = []
        self._threads: list[threading.Thread] = []

    def concerns(self, group: dist.ProcessGroup) -> None:
        """When something fails, what a group of NCCL has under way ends."""
        self._groups.append(weakref.ref(group))

    def fail(self, failure: str) -> None:
        """Something has failed: nothing that is under way will be completed."""
        self.failures.append(failure)
        groups, self._groups = self._groups, []
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        for group in filter(None, (each() for each in groups)):
            _GIVEN_UP.add(group)
            thread = threading.Thread(target=_abort, args=(group, device), name="partita-aborts", daemon=True)
            thread.start()
            self._threads.append(thread)

    def is_over(self) -> bool:
        """Whether all aborts have ended, which is waited for a while."""
        deadline = time.monotonic() + ABORTED_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def are_given_up() -> bool:
    """Whether there are groups of NCCL that were aborted here, or are being aborted."""
    return len(_GIVEN_UP) > 0


def _abort(group: dist.ProcessGroup, device: int | None) -> None:
    """Ends the kernels of a group's NCCL communicators, for which no other rank is needed, and the communicators.

    Args:
        device: of this rank; None: none is used. A thread begins on GPU 0, where this rank has nothing.
    """
    with suppress(RuntimeError):
        if device is not None:
            torch.cuda.set_device(device)
    with suppress(RuntimeError):
        group._get_backend(torch.device("cuda")).abort()


def break_connections(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Closes the connections of a group of gloo: what a receive does when its time is over."""
    with suppress(RuntimeError):
        nothing = torch.empty(1, dtype=torch.uint8, device=HOST)
        group.recv([nothing], (rank + 1) % world_size, BREAK_TAG).wait(BREAK_TIMEOUT)
