"""Learning-rate schedules with DeepSpeed's names, parameters, defaults and values, as torch schedulers.

The engine calls ``step()`` once after each optimizer step that was not skipped. ``lr_at(k)`` is the learning rate after
``k`` such calls, so optimizer step number ``k`` (from 0) uses ``lr_at(k)``. It is a pure function of ``k``.

[Note: two steps at the bottom]
DeepSpeed's warm-up schedules count from -1: before the first ``step()`` they sit at the minimum, and the first
``step()`` leads to iteration 0, which is the minimum again. ``lr_at(k)`` therefore evaluates the formula at iteration
``k - 1``, and a configuration moved from DeepSpeed trains with the same learning rate at every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from partita.config import suggest
from partita.optim.schedule import PerGroup, Schedule


def _initial_lrs(optimizer: Optimizer) -> list[float]:
    """What ``LRScheduler.base_lrs`` will be; needed before its constructor, which already asks for the first values."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


class _Warmup(Schedule):
    """The part that the warm-up schedules share: a factor from 0 to 1 over ``warmup_num_steps`` iterations."""

    def _set_warmup(self, num_steps: int, kind: str) -> None:
        if kind not in ("log", "linear"):
            raise self._error("warmup_type", "'log' or 'linear'", kind)
        self.warmup_type = kind
        # At least 2, as in DeepSpeed: the log form divides by ln(n).
        self.warmup_num_steps = max(2, self._count("warmup_num_steps", num_steps))

    def _set_total(self, total: int, warmup: int) -> None:
        self.total_num_steps = self._count("total_num_steps", total)
        if self.total_num_steps < self._count("warmup_num_steps", warmup):
            raise self._error("total_num_steps", f"at least warmup_num_steps ({warmup})", total)

    def _warmup_factor(self, iteration: int) -> float:
        """log: ln(i + 1) / ln(n); linear: i / n."""
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps


class WarmupLR(_Warmup):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps`` steps, then constant.

    Args:
        optimizer: its param groups are written at once and at each ``step()``.
        warmup_min_lr: a number, or a list with one for each group.
        warmup_max_lr: the same; None takes each group's own ``lr``.
        warmup_num_steps: iterations ``n`` until the maximum (2 at the least).
        warmup_type: "log": min + (max - min) ln(i + 1) / ln(n); "linear": min + (max - min) i / n; i is the iteration.

    Raises ValueError, naming the parameter, for a value outside its range. See [Note: two steps at the bottom].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        max_lr = _initial_lrs(optimizer) if warmup_max_lr is None else warmup_max_lr
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr, optimizer)
        self.max_lrs = self._per_group("warmup_max_lr", max_lr, optimizer)
        self._ordered("warmup_min_lr", self.min_lrs, "warmup_max_lr", self.max_lrs)
        super().__init__(optimizer, self._count("last_batch_iteration", last_batch_iteration, low=-1))

    def lr_at(self, step: int) -> list[float]:
        iteration = max(0, step - 1)
        warming = iteration < self.warmup_num_steps
        factor = self._warmup_factor(iteration) if warming else self._after_warmup(iteration)
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _after_warmup(self, iteration: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """``WarmupLR``, then linearly back to ``warmup_min_lr`` at ``total_num_steps``, where it stays.

    After warm-up: min + (max - min) (total - i) / (total - n). Parameters as ``WarmupLR``, but ``warmup_max_lr`` is
    0.001 when left out, and ``total_num_steps`` counts warm-up and decay together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_total(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _after_warmup(self, iteration: int) -> float:
        return max(0.0, (self.total_num_steps - iteration) / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Each group's own ``lr`` times a ratio: from ``warmup_min_ratio`` up to 1, then a cosine to ``cos_min_ratio``.

    After warm-up: c + (1 - c) (1 + cos(pi p)) / 2 with p = (i - n + 1) / (total - n), at most 1, and c = cos_min_ratio.
    As in DeepSpeed the very first optimizer step has learning rate 0, whatever ``warmup_min_ratio`` is; the ratio
    counts from the second step on.

    Args:
        total_num_steps: warm-up and decay together.
        warmup_min_ratio, cos_min_ratio: from 0 to 1.
        warmup_num_steps, warmup_type: as in ``WarmupLR``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        self._set_total(total_num_steps, warmup_num_steps)
        self.warmup_min_ratio = self._ratio("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = self._ratio("cos_min_ratio", cos_min_ratio)
        self.max_lrs = _initial_lrs(optimizer)
        super().__init__(optimizer, self._count("last_batch_iteration", last_batch_iteration, low=-1))

    def lr_at(self, step: int) -> list[float]:
        ratio = self._ratio_at(step - 1)
        return [lr * ratio for lr in self.max_lrs]

    def get_lr_ratio(self) -> float:
        """What each group's own ``lr`` is multiplied by at this position."""
        return self._ratio_at(self.last_batch_iteration)

    def _ratio_at(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._warmup_factor(iteration)
        decay_steps = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / decay_steps)
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


class OneCycle(Schedule):
    """One triangle from ``cycle_min_lr`` to ``cycle_max_lr`` and back, then a decay; beta1 runs the other way.

    Up in ``cycle_first_step_size`` steps, down in ``cycle_second_step_size`` (None: the same). After the cycle, every
    ``decay_step_size`` steps (0: no decay) add one to d, continuously: lr = min / (1 + decay_lr_rate d) and
    beta1 = max (1 + decay_mom_rate d). Source: Smith, arXiv:1803.09820, in DeepSpeed's form.

    A stair count other than 0 cuts a half into that many flat stairs (None for the second: as the first).

    Momentum differs from DeepSpeed on purpose in three ways: beta2 stays as the optimizer has it (DeepSpeed: 0.99);
    the first step has ``cycle_max_mom``, where the cycle starts (DeepSpeed: ``cycle_min_mom`` for that one step);
    and a growing beta1 stops at 0.999, or at ``cycle_max_mom`` if that is larger, where it would go past 1.

    Raises ValueError for a value outside its range, and when ``cycle_momentum`` is on but the optimizer has no betas.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        second_size = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.first_size = self._count("cycle_first_step_size", cycle_first_step_size)
        self.second_size = self._count("cycle_second_step_size", second_size, low=0)
        self.first_stairs = self._count("cycle_first_stair_count", cycle_first_stair_count, low=0)
        self.second_stairs = self._count("cycle_second_stair_count", second_stairs, low=0)
        self.min_lrs = self._per_group("cycle_min_lr", cycle_min_lr, optimizer)
        self.max_lrs = self._per_group("cycle_max_lr", cycle_max_lr, optimizer)
        self._ordered("cycle_min_lr", self.min_lrs, "cycle_max_lr", self.max_lrs)
        self.min_moms = self._per_group("cycle_min_mom", cycle_min_mom, optimizer, below=1)
        self.max_moms = self._per_group("cycle_max_mom", cycle_max_mom, optimizer, below=1)
        self._ordered("cycle_min_mom", self.min_moms, "cycle_max_mom", self.max_moms)
        self.decay_size = self._count("decay_step_size", decay_step_size, low=0)
        self.decay_lr_rate = self._number("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = self._number("decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and not all("betas" in group for group in optimizer.param_groups):
            rule = f"false for {type(optimizer).__name__}, which has no betas"
            raise self._error("cycle_momentum", rule, cycle_momentum)
        super().__init__(optimizer, self._count("last_batch_iteration", last_batch_iteration, low=-1))

    def lr_at(self, step: int) -> list[float]:
        height, decay = self._height(step), 1 + self.decay_lr_rate * self._decay_intervals(step)
        return [(low + (high - low) * height) / decay for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def momentum_at(self, step: int) -> list[float]:
        """beta1 of each param group after ``step`` calls of ``step()``."""
        height, growth = self._height(step), 1 + self.decay_mom_rate * self._decay_intervals(step)
        return [
            min((high - (high - low) * height) * growth, max(high, 0.999))
            for low, high in zip(self.min_moms, self.max_moms, strict=True)
        ]

    def get_mom(self) -> list[tuple[float, ...]] | None:
        """The betas of each param group at this position; None when ``cycle_momentum`` is off."""
        if not self.cycle_momentum:
            return None
        groups = zip(self.optimizer.param_groups, self.momentum_at(self.last_epoch), strict=True)
        return [(beta1, *group["betas"][1:]) for group, beta1 in groups]

    def _height(self, step: int) -> float:
        """Where the triangle stands: 0 at its foot and after it, 1 at its top."""
        if step <= self.first_size:
            position, size, stairs = step, self.first_size, self.first_stairs
        else:
            position, size, stairs = self.first_size + self.second_size - step, self.second_size, self.second_stairs
        if position <= 0:
            return 0.0
        return position * stairs // size / stairs if stairs else position / size

    def _decay_intervals(self, step: int) -> float:
        past = max(0, step - self.first_size - self.second_size)
        return past / self.decay_size if self.decay_size else 0.0

    def _write(self) -> None:
        super()._write()
        for group, betas in zip(self.optimizer.param_groups, self.get_mom() or [], strict=False):
            group["betas"] = betas


class LRRangeTest(Schedule):
    """A learning rate that grows without end, to find where training diverges: min (1 + rate k / size).

    Source: Smith, arXiv:1803.09820, in DeepSpeed's form.

    Args:
        lr_range_test_min_lr: at the first step; a number, or a list with one for each group.
        lr_range_test_step_size: optimizer steps in which the factor grows by ``lr_range_test_step_rate``.
        lr_range_test_staircase: grow once every step size and not at every step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr, optimizer)
        self.step_size = self._count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = self._number("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, self._count("last_batch_iteration", last_batch_iteration, low=-1))

    def lr_at(self, step: int) -> list[float]:
        intervals = step // self.step_size if self.staircase else step / self.step_size
        return [lr * (1 + self.step_rate * intervals) for lr in self.min_lrs]


_OWN: dict[str, type[LRScheduler]] = {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


def scheduler_types() -> dict[str, type[LRScheduler]]:
    """Every name that ``make_scheduler`` takes: DeepSpeed's five, then the public classes of torch."""
    torch_types = {
        name: cls
        for name, cls in vars(torch.optim.lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, LRScheduler) and name not in ("LRScheduler", "_LRScheduler")
    }
    return _OWN | torch_types


def make_scheduler(type_name: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """The scheduler of a config's ``scheduler: {type, params}``, over ``optimizer``.

    Args:
        type_name: one of ``scheduler_types()``.
        params: its keyword arguments without the optimizer.

    Raises:
        ValueError: for an unknown type, an unknown or missing parameter, each with the nearest valid name, or a value
            that the schedule refuses.
    """
    require_scheduler(type_name, params)
    return scheduler_types()[type_name](optimizer=optimizer, **params)


def require_scheduler(type_name: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown type, an unknown or a missing parameter, each with the nearest valid name."""
    types = scheduler_types()
    if type_name not in types:
        raise ValueError(f"scheduler type {type_name!r} is unknown{suggest(type_name, types)}")
    signature = inspect.signature(types[type_name]).parameters
    valid = [name for name in signature if name != "optimizer"]
    for name in params:
        if name not in valid:
            raise ValueError(f"{type_name} has no parameter {name!r}{suggest(name, valid)}")
    missing = [name for name in valid if signature[name].default is inspect.Parameter.empty and name not in params]
    if missing:
        raise ValueError(f"{type_name} needs the parameter {missing[0]!r} in the scheduler's params")
