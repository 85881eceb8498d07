"""The learning-rate schedule of a run, which the engine alone steps."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger("partita")


class WatchedSchedule:
    """Steps a schedule, and says so once when the program steps it too, which would move the learning rate twice.

    A program that loads the state of a schedule moves its count as well, once. So the count has to have moved twice
    between two steps of ours.

    Args:
        scheduler: has step(). One of torch also counts its steps, as `last_epoch`; one that does not is not watched.
        optimizer: whose learning rates it moves; None: there is none.
        warns: whether this rank says so.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer | None, *, warns: bool) -> None:
        self._scheduler = scheduler
        self._groups = [] if optimizer is None else optimizer.param_groups
        self._warns = warns
        self._count = self._now()
        self._moved = 0

    def state_dict(self) -> dict[str, Any]:
        """The schedule's."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The schedule goes on from a state, which is no step of the program's.

        A schedule may write learning rates when it is loaded. Of several in one, all do, and only the one whose turn it
        is has the learning rates of the whole.
        """
        before = [float(group["lr"]) for group in self._groups]
        self._scheduler.load_state_dict(state)
        if before != [float(group["lr"]) for group in self._groups] and hasattr(self._scheduler, "get_last_lr"):
            for group, lr in zip(self._groups, self._scheduler.get_last_lr(), strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
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
