"""What all schedules with DeepSpeed's names share: a position, its state, and checks of what a user wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PerGroup = float | Sequence[float]
"""One number for all param groups, or a list with one number for each."""


class Schedule(LRScheduler):
    """A torch scheduler whose learning rates are a pure function of the number of ``step()`` calls.

    The state holds the position only: the shape comes from the configuration in effect, so that a run can be resumed
    with a longer ``total_num_steps``. Loading it writes the learning rates of that position into the optimizer.

    ``last_batch_iteration`` (every subclass) is DeepSpeed's: -1 starts the schedule, ``n`` continues one that has been
    stepped ``n + 1`` times, for which the param groups must hold ``initial_lr``, as torch demands for ``last_epoch``.
    """

    def lr_at(self, step: int) -> list[float]:
        """The learning rate of each param group after ``step`` calls of ``step()``."""
        raise NotImplementedError

    def get_lr(self) -> list[float | torch.Tensor]:
        return [*self.lr_at(self.last_epoch)]

    def step(self, epoch: int | None = None, **named: int | None) -> None:
        """Go to the next position, and write its values into the optimizer.

        Args:
            epoch: DeepSpeed's iteration to go to, which is where ``epoch + 1`` calls without an argument lead.
            named: the same as ``batch_iteration`` or ``last_batch_iteration``, as DeepSpeed calls it.
        """
        unknown = named.keys() - {"batch_iteration", "last_batch_iteration"}
        given = [value for value in (epoch, *named.values()) if value is not None]
        if unknown or len(given) > 1:
            raise TypeError(f"{type(self).__name__}.step() takes one iteration, got {sorted(named)} and {epoch}")
        # torch's own step() warns unless it saw the optimizer's step() called; a sharded optimizer steps in its place.
        self._update_lr(self._count("iteration", given[0], low=-1) + 1 if given else None)

    def _update_lr(self, epoch: int | None = None) -> None:
        """Goes to the next position, or to one of torch's counting; what ``SequentialLR`` calls, too."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write()

    @property
    def last_batch_iteration(self) -> int:
        """DeepSpeed's count of ``step()`` calls: -1 before the first one."""
        return int(self.last_epoch) - 1

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a saved position; DeepSpeed's state, ``last_batch_iteration``, is taken too."""
        if "last_epoch" in state_dict:
            self.last_epoch = state_dict["last_epoch"]
        elif "last_batch_iteration" in state_dict:
            self.last_epoch = state_dict["last_batch_iteration"] + 1
        else:
            raise ValueError(f"{type(self).__name__}: the state has no 'last_epoch', only {sorted(state_dict)}")
        self._write()

    def _write(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.lr_at(self.last_epoch), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = self.get_lr()

    # Checks of what the user wrote; each returns the value in the type that the formulas use.

    def _error(self, name: str, rule: str, value: object) -> ValueError:
        return ValueError(f"{type(self).__name__}: {name} must be {rule}, got {value!r}")

    def _number(self, name: str, value: object, below: float = math.inf) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
            raise self._error(name, f"a number from 0 to {below:g}, exclusive", value)
        return float(value)

    def _ratio(self, name: str, value: object) -> float:
        ratio = self._number(name, value)
        if ratio > 1:
            raise self._error(name, "a ratio from 0 to 1", value)
        return ratio

    def _count(self, name: str, value: object, low: int = 1) -> int:
        number = int(value) if isinstance(value, float) and value.is_integer() else value  # JSON writes 1000 as 1e3 too
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise self._error(name, f"an integer >= {low}", value)
        return number

    def _per_group(self, name: str, value: object, optimizer: Optimizer, below: float = math.inf) -> list[float]:
        groups = len(optimizer.param_groups)
        values = list(value) if isinstance(value, list | tuple) else [value] * groups
        if len(values) != groups:
            raise self._error(name, f"one number or a list of {groups}, one for each param group", value)
        return [self._number(name, each, below) for each in values]

    def _ordered(self, low_name: str, lows: list[float], high_name: str, highs: list[float]) -> None:
        for group, (low, high) in enumerate(zip(lows, highs, strict=True)):
            if low > high:
                raise self._error(low_name, f"at most {high_name} ({high!r} in param group {group})", low)
