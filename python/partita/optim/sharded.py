"""The optimizer of the engine: one step over all units, whatever the stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from partita.comm import Communicator
from partita.device import kernels
from partita.optim.elementwise import why_not_elementwise
from partita.optim.fused_adam import is_native
from partita.optim.step_control import StepController
from partita.optim.updates import NativeAdam, ShardUpdate, TorchUpdate
from partita.units import ParameterGathers, ShardSlice, StagePolicy, Unit


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
    """Updates this rank's own range of every unit and gathers the new parameters.

    Its `param_groups` are those of the user's optimizer, so learning-rate schedules on either work. `engine.step()`
    runs it.
    """

    def __init__(
        self,
        inner: Optimizer,
        units: list[Unit],
        communicator: Communicator,
        policy: StagePolicy,
        controller: StepController,
        gathers: ParameterGathers,
    ) -> None:
        self.inner = inner
        self._units = units
        self._communicator = communicator
        self._policy = policy
        self._controller = controller
        self._gathers = gathers
        self._update = self._choose_update(inner)
        self._norm_parts, self._host_norm_parts = (
            [kernels.norm_part(unit.reduced, unit.norm_segments) for unit in units if unit.offloads == on_host]
            for on_host in (False, True)
        )
        super().__init__([torch.empty(0)], dict(inner.defaults))
        self.param_groups = inner.param_groups
        # Schedules warn when step() was not seen before theirs; ours runs inside engine.step().
        for optimizer in (self, inner):
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def _choose_update(self, inner: Optimizer) -> ShardUpdate:
        if is_native(inner):
            return NativeAdam(inner, self._units, self._controller)
        # Some (Adagrad) make their state when constructed, and again when it is missing: the shards take the place of
        # the parameters that it belongs to.
        inner.state.clear()
        return TorchUpdate(inner, self._units, self._controller)

    def run(self, *, mean: float, clip: float) -> None:
        """One step from `Unit.reduced` of all units; the control block tells afterwards what was decided.

        The new parameters of other ranks are there when their gathers have been waited for.
        """
        total = self._controller.sum_of_squares.zero_()
        kernels.sum_of_squares(total, self._norm_parts)
        if self._host_norm_parts:
            on_host = torch.zeros(1, dtype=torch.float64)
            kernels.sum_of_squares(on_host, self._host_norm_parts)
            total += on_host.to(total.device, non_blocking=True)
        self._communicator.all_reduce(total).wait()
        self._controller.decide(mean=mean, clip=clip)
        self._update.begin()
        gathered = self._policy.shards_states and self._communicator.world_size > 1
        here = [i for i, unit in enumerate(self._units) if gathered and unit.residence.all_gathers_updates]
        self._update.update(i for i in range(len(self._units)) if i not in here)
        # Forward needs the last units first; the gathering of each goes on beside the update of the next.
        for i in reversed(here):
            self._update.update([i])
            self._gathers.add(i, self._communicator.all_gather(self._units[i].params))
        if any(unit.residence.is_read_by_peers for unit in self._units):
            self._communicator.barrier()  # then every rank may read what the others have written

    def states(self, unit: int, key: str) -> list[tuple[ShardSlice, torch.Tensor]]:
        """What this rank has of an optimizer state, by the index of the unit; nothing if there is none (yet)."""
        return self._update.states(unit, key)

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: gradients are consumed by `engine.step()`."""

    def state_dict(self) -> dict[str, Any]:
        """Not in this version.

        Raises:
            NotImplementedError: always; a part of the states of one rank would look like all of them.
        """
        raise NotImplementedError("optimizer states are partitioned over ranks; this version does not save them yet")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not in this version, as `state_dict`."""
        raise NotImplementedError("optimizer states are partitioned over ranks; this version does not load them yet")
