"""What every sink of records is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from partita.monitor.records import Record


class Sink(Protocol):
    """Where records go. One thread at a time calls it. Every call may raise, and none is made after one that has."""

    name: str  # as in the config

    def go_on_from(self, step: int, samples: int) -> None:
        """What comes next follows this step: called before the first record, and when the run has gone back.

        What is there of later steps is of no run any more. At step 0 a run begins anew.
        """

    def write(self, records: Sequence[Record]) -> None:
        """Writes them where others can see them."""

    def close(self) -> None:
        """Nothing comes any more."""
