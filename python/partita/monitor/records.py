"""What monitors are told about a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepWaits:
    """Who was waited for in one optimizer step.

    slowest_rank: whom the others waited for longest; None: nobody waited long enough to tell.
    waited_share: of the step's time that ranks spent waiting for each other, from 0 to 1.
    """

    slowest_rank: int | None
    waited_share: float
