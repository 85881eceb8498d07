"""The learning-rate schedule of a run, which the engine alone steps."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("partita")


class WatchedSchedule:
    """Steps a schedule, and says so once when the program steps it too, which would move the learning rate twice.

    A program that loads the state of a schedule moves its count as well, once. So the count has to have moved twice
    between two steps of ours.

    Args:
        scheduler: has step(). One of torch also counts its steps, as `last_epoch`; one that does not is not watched.
        warns: whether this rank says so.
    """

    def __init__(self, scheduler: Any, *, warns: bool) -> None:
        self._scheduler = scheduler
        self._warns = warns
        self._count = self._now()
        self._moved = 0

    def state_dict(self) -> dict[str, Any]:
        """The schedule's."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The schedule goes on from a state, which is no step of the program's."""
        self._scheduler.load_state_dict(state)
        self._count = self._now()
        self._moved = 0

    def step(self) -> None:
        """One step of the schedule, after an update."""
        self._moved += self._now() != self._count
        if self._moved == 2 and self._warns:
            self._warns = False
            logger.warning(
                "lr_scheduler.step() is called by the program and by engine.step(), so the learning rate moves twice: "
                "remove the call, or do not give the scheduler to initialize() (nor name one in the config)"
            )
        self._scheduler.step()
        self._count = self._now()

    def _now(self) -> Any:
        return getattr(self._scheduler, "last_epoch", None)
