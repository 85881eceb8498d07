"""How the shards are updated: what an update is, and the native one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from partita._core import AdamPart, Segments
from partita.device import HOST, kernels
from partita.optim.fused_adam import FusedAdam, adam_group
from partita.optim.step_control import StepController
from partita.optim.step_hooks import StepCall
from partita.optim.waiting import WaitedSteps, frozen_slots
from partita.units import Slot, Unit

# By parameter, and some optimizers' own by other keys.
States = dict[Any, dict[str, Any]]


class ShardUpdate(ABC):
    """Turns reduced gradients into new weights, in this rank's own range of every unit.

    What the update keeps for every element lies in `Unit.states`, and by parameter in `Unit.kept`. `state_dict()` has
    the rest.
    """

    @abstractmethod
    def begin(self, call: StepCall) -> None:
        """A step starts: hyper-parameters may have changed. `call` is what hooks made of the arguments of `step()`."""

    @abstractmethod
    def update(self, indices: Iterable[int]) -> None:
        """Writes the new weights of these units into `Unit.own_params`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps beside `Unit.states`, by parameter."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict()` of a run with the same parameters gave. `Unit.states` have their names and sizes
        afterwards; their values are the caller's to write.

        Raises:
            ValueError: the state is of other parameters; nothing has changed then.
        """

    @abstractmethod
    def values_of(self, state: dict[str, Any]) -> set[tuple[str, str]]:
        """(parameter, name in `Unit.states`) of the values that this rank has once `state` has been loaded."""

    @abstractmethod
    def from_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """What `load_state_dict()` takes here, out of the `state_dict()` of all ranks of a run whose ranks kept other
        parts of the same parameters.

        Raises:
            ValueError: another kind of optimizer saved these states.
        """

    @abstractmethod
    def keeping(self, state: dict[str, Any] | None, names: Collection[str], applied: int) -> dict[str, Any] | None:
        """`state` (None: nothing is loaded), made such that these parameters go on with what they have now in a run
        that has applied so many steps."""

    @abstractmethod
    def states(self) -> States:
        """What torch's optimizer has in `state` after the same steps, in memory of its own. Only where this rank has
        all states, in stage 0."""

    @abstractmethod
    def close(self) -> None:
        """The optimizer is the user's again."""


class NativeAdam(ShardUpdate):
    """One native pass over the units; the moments are float32."""

    def __init__(
        self, optimizer: Optimizer, units: list[Unit], controller: StepController, host_threads: int | None = None
    ) -> None:
        self._optimizer = optimizer
        self._host_threads = host_threads
        self._units = units
        self._controller = controller
        self._host_control = torch.empty(0, dtype=torch.uint8, device=HOST)
        self._waits = WaitedSteps()
        self._frozen = [frozenset[Slot]() for _ in units]
        # Of each group that the native update is told of: the optimizer's group, and the steps waited.
        self._kinds = [(i, 0) for i in range(len(optimizer.param_groups))]
        self._groups = [adam_group(group) for group in optimizer.param_groups]
        for unit in units:
            unit.states = {name: unit.state_buffer(torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            unit.kept = {
                name: {s.slot: flat[s.in_shard] for s in unit.own_slices()} for name, flat in unit.states.items()
            }
        self._parts = [_adam_part(unit, unit.segments) for unit in units]

    def begin(self, call: StepCall) -> None:
        if call.has_closure:
            raise RuntimeError("a step pre-hook gave step() a closure, which engine.step() cannot run: return None")
        if (frozen := frozen_slots(self._units)) != self._frozen:
            self._freeze(frozen)
        groups = self._optimizer.param_groups
        self._groups = [adam_group(groups[i], waited) for i, waited in self._kinds]
        if any(unit.offloads for unit in self._units):
            self._host_control = self._controller.control_on_host()

    def update(self, indices: Iterable[int]) -> None:
        chosen = list(indices)
        resident = [self._parts[i] for i in chosen if not self._units[i].offloads]
        if resident:
            kernels.adam(resident, self._groups, self._controller.control)
        for i in (i for i in chosen if self._units[i].offloads):
            self._units[i].settle()
            kernels.adam([self._parts[i]], self._groups, self._host_control, threads=self._host_threads)
            self._units[i].publish()  # on its way to the device beside the update of the next

    def _freeze(self, frozen: list[frozenset[Slot]]) -> None:
        """Only these parameters stand still from this step on. The host waits for the number of the step."""
        skips, applied = self._controller.last.skip, self._controller.loss_scale.applied_steps
        self._waits.begin((slot.name for slots in frozen for slot in slots), applied if skips else applied - 1)
        self._frozen = frozen
        own = [(s, slots) for unit, slots in zip(self._units, frozen, strict=True) for s in unit.own_slices()]
        extra = {(s.slot.group, self._waits.of(s.slot.name)) for s, slots in own if s.slot not in slots}
        plain = [(i, 0) for i in range(len(self._optimizer.param_groups))]
        self._kinds = plain + sorted(extra - set(plain))
        group_of = {kind: i for i, kind in enumerate(self._kinds)}
        for i, (unit, slots) in enumerate(zip(self._units, frozen, strict=True)):
            moving = [s for s in unit.own_slices() if s.slot not in slots]
            rows = [(s.shard_offset, s.numel, group_of[s.slot.group, self._waits.of(s.slot.name)]) for s in moving]
            self._parts[i] = _adam_part(unit, Segments(rows))

    def state_dict(self) -> dict[str, Any]:
        waited = self._waits.after(self._controller.loss_scale.applied_steps)
        return {"optimizer": self._kind(), **({"waited": waited} if waited else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values_of(state)  # which refuses
        self._waits.load(state.get("waited", {}))
        self._frozen = []  # so that the next step looks

    def values_of(self, state: dict[str, Any]) -> set[tuple[str, str]]:
        if "parameters" in state:
            raise other_kind(state, self._kind())
        if others := sorted(state.get("waited", {}).keys() - self._names()):
            raise ValueError(f"the optimizer has no parameter '{others[0]}', of which there is a state")
        return {(s.slot.name, name) for unit in self._units for s in unit.own_slices() for name in unit.states}

    def from_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        known = self._names()
        waited = {name: n for state in states for name, n in state.get("waited", {}).items() if name in known}
        others = {key: value for state in states for key, value in state.items() if key != "waited"}
        if "parameters" in others:
            raise other_kind(others, self._kind())
        return {**others, "waited": waited} if waited else others

    def keeping(self, state: dict[str, Any] | None, names: Collection[str], applied: int) -> dict[str, Any] | None:
        here = self._controller.loss_scale.applied_steps
        waited = self._waits.after(here)
        counts = {name: applied - (here - waited.get(name, 0)) for name in self._names() & set(names)}
        kept = {**(state or {}).get("waited", {}), **{name: steps for name, steps in counts.items() if steps}}
        return {**(state or {}), "waited": kept} if kept else state

    def states(self) -> States:
        applied = self._controller.loss_scale.applied_steps
        waited = self._waits.after(applied)
        is_fused = isinstance(self._optimizer, FusedAdam)
        found: States = {}
        for unit in self._units:
            masters = unit.full_precision()
            parameters = dict(zip(unit.layout.slots, unit.parameters, strict=True))
            for s in unit.own_slices():
                step = applied - waited.get(s.slot.name, 0)
                if not step:
                    continue
                state: dict[str, Any] = {
                    "step": step if is_fused else torch.tensor(float(step), dtype=torch.float32, device=HOST)
                }
                state.update((name, flat[s.in_shard].view(s.slot.shape).clone()) for name, flat in unit.states.items())
                if is_fused and unit.dtype != torch.float32:
                    state["master"] = masters[s.in_shard].view(s.slot.shape).clone()
                found[parameters[s.slot]] = state
        return found

    def close(self) -> None:
        return  # its param groups are as they were

    def _kind(self) -> str:
        """For people: every native Adam takes the states of every other."""
        return f"{type(self._optimizer).__name__} (native)"

    def _names(self) -> set[str]:
        """Of the parameters that are trained."""
        return {slot.name for unit in self._units for slot in unit.layout.slots}


def other_kind(state: dict[str, Any], here: str) -> ValueError:
    """The error for the state of another kind of optimizer than the one here."""
    return ValueError(
        f"the states are those of {state.get('optimizer', 'another optimizer')}, and the optimizer of this run is "
        f"{here}: load_optimizer_states=False goes on without them"
    )


def _adam_part(unit: Unit, segments: Segments) -> kernels.Part[AdamPart]:
    return kernels.adam_part(
        grads=unit.reduced,
        master=unit.master,
        remainder=unit.remainder,
        exp_avg=unit.states["exp_avg"],
        exp_avg_sq=unit.states["exp_avg_sq"],
        params=None if unit.dtype == torch.float32 else unit.updated,
        segments=segments,
    )
