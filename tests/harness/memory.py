"""How much memory a process takes while it does something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from partita.comm import Communicator, SharedMemoryCommunicator

SAMPLE_EVERY_S = 0.001


@contextmanager
def peak_growth(communicator: Communicator) -> Iterator[list[int]]:
    """Yields a list that holds, after the block, how many bytes this process grew in it at the most.

    Of a rank's shared memory, what counts is what the rank itself has committed: its resident size also counts the
    pages of its peers that it reads.
    """
    if isinstance(communicator, SharedMemoryCommunicator):
        before = _resident_bytes("RssAnon") + communicator.committed_bytes
        with _peak_of(lambda: _resident_bytes("RssAnon") + communicator.committed_bytes) as peak:
            yield peak
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, peak = _resident_bytes("VmRSS"), [0]
        yield peak
        peak[0] = _resident_bytes("VmHWM")
    peak[0] -= before


@contextmanager
def peak_without_files() -> Iterator[list[int]]:
    """As `peak_growth()`, without what this process has mapped of files."""
    before = _resident_bytes("RssAnon")
    with _peak_of(lambda: _resident_bytes("RssAnon")) as peak:
        yield peak
    peak[0] -= before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def _peak_of(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Samples `measure` from a thread until the block ends; yields a list that then holds the peak."""
    samples = [measure()]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            samples[0] = max(samples[0], measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
