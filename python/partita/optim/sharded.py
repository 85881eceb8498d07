"""The optimizer that a program holds: the hyper-parameters of the user's, and none of its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita.device import HOST
from partita.optim.elementwise import why_not_elementwise
from partita.optim.fused_adam import is_native
from partita.optim.updates import States
from partita.units import StagePolicy

# What schedules of torch have in a param group.
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


def require_supported(optimizer: Optimizer, policy: StagePolicy, *, splits_masters: bool) -> None:
    """Raises ValueError, naming the optimizer and the reason, unless the engine can run it in this stage."""
    name = type(optimizer).__name__
    if any(float(state.get("step", 1)) for state in optimizer.state.values()):
        raise ValueError(f"{name} has state of earlier steps, which would be lost: give initialize() a fresh optimizer")
    if is_native(optimizer):
        return
    if splits_masters:
        raise ValueError(
            f'{name} needs whole master weights, and bf16.master_weights is "split": set it to "fp32", or use Adam or '
            "AdamW without options that the native update lacks"
        )
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    if any(a.default is a.empty and a.kind is not a.VAR_POSITIONAL and a.kind is not a.VAR_KEYWORD for a in arguments):
        raise ValueError(
            f"{name} cannot be used: its step() needs a closure that computes the loss again, and engine.step() has "
            "none; use an optimizer such as AdamW or SGD"
        )
    if policy.shards_states and (reason := why_not_elementwise(optimizer)) is not None:
        raise ValueError(
            f"{name} cannot run over shards of parameters in ZeRO stage {policy.stage}: {reason}; use stage 0, or an "
            "element-wise optimizer such as AdamW or SGD"
        )


class ShardedOptimizer(Optimizer):
    """What `engine.optimizer` is.

    Its `param_groups` are those of the user's optimizer `inner`, so learning-rate schedules work on either. The
    updates themselves are `ShardedStep`'s, which `engine.step()` runs. Hooks of `step()` may be on either, too.

    `isinstance()` takes it for one of the user's class. `type()` does not: nothing of that class runs here.
    """

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self._states: Callable[[], States] | None = None
        super().__init__([torch.empty(0, dtype=torch.float32, device=HOST)], dict(inner.defaults))
        self.param_groups = inner.param_groups
        # Schedules warn when step() was not seen before theirs; ours runs inside engine.step().
        for optimizer in (self, inner):
            optimizer._opt_called = True  # type: ignore[attr-defined]

    @property  # type: ignore[misc]
    def __class__(self) -> type[Optimizer]:  # type: ignore[override]
        return type(self.inner)

    def give_states(self, states: Callable[[], States] | None) -> None:
        """From now on `state_dict()` has what this function returns: the states of each parameter. None: it has
        none."""
        self._states = states

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Not for callers: gradients are reduced, scaled and counted by the engine.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "call engine.step() instead of optimizer.step(): the engine reduces and scales gradients first"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while this is constructed.

        Raises:
            RuntimeError: later, when a new group would not be trained.
        """
        if getattr(self, "param_groups", None):
            raise RuntimeError("a param group added after initialize() would not be trained: add it before")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """In stage 0 what torch has: an optimizer of the user's class over a copy of the model loads it. Its tensors
        have memory of their own.

        Raises:
            NotImplementedError: in stages 1 to 3; a part of the states of one rank would look like all of them.
        """
        if self._states is None:
            raise NotImplementedError(
                "optimizer.state_dict(): the states are partitioned over the ranks in ZeRO stages 1 to 3; "
                "engine.train_state() has all of this rank's, and utils.safe_get_full_optimizer_state(parameter, name) "
                "gives one whole state. In stage 0 this gives what torch has"
            )
        numbers: dict[int, int] = {}
        groups = []
        for group in self.param_groups:
            packed = {name: value for name, value in group.items() if name != "params"}
            groups.append({**packed, "params": [numbers.setdefault(id(p), len(numbers)) for p in group["params"]]})
        states = self._states()
        packed_states = {numbers[id(key)] if isinstance(key, Tensor) else key: value for key, value in states.items()}
        return {"state": packed_states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not in this version.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "optimizer.load_state_dict(): this version takes the state of a whole run, engine.train_state().restore()"
        )


def kept_groups(optimizer: Optimizer) -> Callable[[], None]:
    """Remembers the param groups of an optimizer as they are; the function that is returned gives them back."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    then = [{name: copy(value) for name, value in g.items() if name != "params"} for g in optimizer.param_groups]

    def give_back() -> None:
        for group, values in zip(optimizer.param_groups, then, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(values, params=parameters)

    return give_back


class HyperParameters:
    """The param groups of an optimizer without their parameters, as a state that can be saved."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The hyper-parameters of each group."""
        groups = self._optimizer.param_groups
        return {"groups": [{name: value for name, value in group.items() if name != "params"} for group in groups]}

    def without_schedule(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state without what a schedule moves, which stays as this run's schedule has it."""
        moved = {*SCHEDULED}
        if any("max_momentum" in group for group in self._optimizer.param_groups):
            moved |= {"momentum", "betas"}
        return {**state, "groups": [{k: v for k, v in group.items() if k not in moved} for group in state["groups"]]}

    def under_schedule(self, schedule: dict[str, Any]) -> dict[str, Any]:
        """The state of this run with the learning rates that a schedule of torch had.

        Args:
            schedule: its state. One without the learning rates sets them when it is loaded.
        """
        groups = self.state_dict()["groups"]
        rates = {"lr": schedule.get("_last_lr"), "initial_lr": _base_lrs(schedule)}
        for name, values in rates.items():
            if isinstance(values, list) and len(values) == len(groups):
                for group, value in zip(groups, values, strict=True):
                    if name in group and not (name == "initial_lr" and "max_lr" in group):  # OneCycleLR's has its own
                        group[name] = value
        return {"groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each group takes the hyper-parameters that it had.

        Raises:
            ValueError: the number of groups differs.
        """
        groups, saved = self._optimizer.param_groups, state["groups"]
        if len(groups) != len(saved):
            raise ValueError(
                f"the optimizer has {len(groups)} param groups, and the state has {len(saved)}: group the parameters "
                "as in the run that saved them, or leave the optimizer out with load_optimizer_states=False"
            )
        for group, values in zip(groups, saved, strict=True):
            for name, value in values.items():
                if isinstance(now := group.get(name), Tensor):  # a learning rate that others hold
                    now.copy_(value) if isinstance(value, Tensor) else now.fill_(value)
                else:
                    group[name] = value


def _base_lrs(schedule: dict[str, Any]) -> Any:
    """Of a schedule's state, or of the first schedule in it."""
    if "base_lrs" in schedule:
        return schedule["base_lrs"]
    inner = schedule.get("_schedulers")
    return _base_lrs(inner[0]) if isinstance(inner, list) and inner and isinstance(inner[0], dict) else None
