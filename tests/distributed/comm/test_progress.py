"""Collectives that wait in vain, over a backend whose waits do not raise: the host's own wait ends, and says why."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import inside
import pytest
import torch
from jobs import Job
from partita.comm import CommunicationError, Communicator, world_communicator

WITHIN_S = 60.0
SHORT, LONG = timedelta(seconds=3), timedelta(seconds=300)  # longer than a test may take

Report = Callable[[Any], None]
Deed = Callable[[Communicator, Report], None]


def _stays_away(_: Communicator, report: Report) -> None:
    go_on = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: go_on.set())
    report("stays away")
    go_on.wait()


def _dies(_: Communicator, report: Report) -> None:
    report("dies")
    signal.raise_signal(signal.SIGKILL)


def _fails(communicator: Communicator, _: Report) -> None:
    try:
        raise ZeroDivisionError("in a forward")
    except ZeroDivisionError:
        communicator.close()


def _is_elsewhere(communicator: Communicator, report: Report) -> None:
    with communicator.calls.inside("save_model()"):
        _reduces_more(communicator, report)


def _reduces_more(communicator: Communicator, report: Report) -> None:
    try:
        communicator.broadcast(torch.zeros(70), 1).wait()
        communicator.broadcast(torch.zeros(70), 0).wait()
    except CommunicationError as error:
        report(str(error))


def _at_fault(rank: int, report: Report, deed: Deed, timeout: timedelta) -> None:
    """Rank 1 does something else than rank 0, whose all-reduces the others take part in."""
    with inside.whole_collectives():
        communicator = world_communicator("torch", timeout)
    communicator.barrier()
    try:
        if rank == 1:
            deed(communicator, report)
        else:
            communicator.all_reduce(torch.zeros(7)).wait()
            report("done")
    except CommunicationError as error:
        report(str(error))
        try:
            communicator.all_reduce(torch.zeros(7))
        except CommunicationError as error:
            report(str(error))
    communicator.close()
    report("closed")


# What rank 1 does, and what rank 0 says after its own collective.
DEEDS: dict[str, tuple[Deed, timedelta, str]] = {
    "stays away": (_stays_away, SHORT, "rank 1 has told nothing: it computes, hangs, is stopped or has died"),
    "dies": (_dies, LONG, ""),
    "fails": (_fails, LONG, "rank 1 has left the group: it failed with ZeroDivisionError: in a forward"),
    "is elsewhere": (_is_elsewhere, LONG, "all_reduce of 7 float32 on rank 0 but broadcast of 70 float32 on rank 1"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_rank_that_does_not_come_is_named_with_the_collective(deed):
    """The survivor raises, and goes on to its end by itself."""
    does, timeout, says = DEEDS[deed]
    with Job(2, _at_fault, does, timeout) as job:
        message = job.report(0, WITHIN_S)
        assert message.startswith("all_reduce of 7 float32, on rank 0 of 2 over gloo: "), message
        assert says in message, message
        again = job.report(0)
        assert "after a failed collective (all_reduce of 7 float32" in again, again
        assert job.report(0) == "closed"
        assert job.exits_cleanly(0)
        if deed == "stays away":
            assert "not done, and this rank's host has waited for it for" in message
            assert job.report(1) == "stays away"
            job.signal(1, signal.SIGUSR1)
            assert job.exits_cleanly(1)
