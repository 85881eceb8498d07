"""How the shards are updated: natively, or by any element-wise torch optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita.device import FreedMemory, kernels
from partita.optim.fused_adam import adam_group
from partita.optim.step_control import StepController
from partita.units import ShardSlice, Unit


class ShardUpdate(ABC):
    """Turns reduced gradients into new weights, in this rank's own range of every unit.

    What the update keeps for every element lies in `Unit.states`, by name. `state_dict()` has the rest.
    """

    @abstractmethod
    def begin(self) -> None:
        """A step starts: hyper-parameters may have changed."""

    @abstractmethod
    def update(self, indices: Iterable[int]) -> None:
        """Writes the new weights of these units into `Unit.own_params`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps beside `Unit.states`, by parameter."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict()` of a run with the same parameters gave. `Unit.states` have their names and sizes
        afterwards; their values are the caller's to write."""

    @abstractmethod
    def close(self) -> None:
        """The optimizer is the user's again."""


class NativeAdam(ShardUpdate):
    """One native pass over the units; the moments are float32."""

    def __init__(self, optimizer: Optimizer, units: list[Unit], controller: StepController) -> None:
        self._optimizer = optimizer
        self._units = units
        self._controller = controller
        self._host_control = torch.empty(0)
        self._groups = [adam_group(group) for group in optimizer.param_groups]
        for unit in units:
            unit.states = {name: unit.state_buffer(torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        self._parts = [
            kernels.adam_part(
                grads=unit.reduced,
                master=unit.master,
                remainder=unit.remainder,
                exp_avg=unit.states["exp_avg"],
                exp_avg_sq=unit.states["exp_avg_sq"],
                params=None if unit.dtype == torch.float32 else unit.updated,
                segments=unit.segments,
            )
            for unit in units
        ]

    def begin(self) -> None:
        self._groups = [adam_group(group) for group in self._optimizer.param_groups]
        if any(unit.offloads for unit in self._units):
            self._host_control = self._controller.control_on_host()

    def update(self, indices: Iterable[int]) -> None:
        chosen = list(indices)
        resident = [self._parts[i] for i in chosen if not self._units[i].offloads]
        if resident:
            kernels.adam(resident, self._groups, self._controller.control)
        for i in (i for i in chosen if self._units[i].offloads):
            kernels.adam([self._parts[i]], self._groups, self._host_control)
            self._units[i].publish()  # on its way to the device beside the update of the next

    def state_dict(self) -> dict[str, Any]:
        return {}  # the number of the step is the loss scale's

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"native Adam keeps nothing by parameter, and the state has {sorted(state)}")

    def close(self) -> None:
        return  # its param groups are as they were


class TorchUpdate(ShardUpdate):
    """A torch optimizer whose param groups hold pieces of the flat fp32 masters.

    A parameter that lies whole in this rank's range keeps its shape, so in stage 0 every optimizer sees what it would
    see without Partita. The optimizer runs once per step over all pieces: it may couple them.

    After each step, every tensor of the optimizer's state that has an element for each element of its piece is moved
    into `Unit.states`, and the optimizer has a view of it.

    On a GPU the host waits for the decision whether the step is skipped: optimizers of others cannot read it there.
    """

    def __init__(self, optimizer: Optimizer, units: list[Unit], controller: StepController) -> None:
        self._optimizer = optimizer
        self._units = units
        self._controller = controller
        self._skips = False
        # Some (Adagrad) make their state when constructed, and again when it is missing: the pieces take the place of
        # the parameters that it belongs to.
        optimizer.state.clear()
        self._given = [group["params"] for group in optimizer.param_groups]
        self._pieces = [[_piece(unit.full_precision(), s) for s in unit.own_slices()] for unit in units]
        self._views: dict[tuple[int, str], Tensor] = {}  # of `Unit.states`, as the optimizer has them
        for i, group in enumerate(optimizer.param_groups):
            group["params"] = [piece for _, s, piece in self._all_pieces() if s.slot.group == i]

    def begin(self) -> None:
        control = self._controller.last
        self._skips = control.skip
        if self._skips:
            return
        for unit, pieces in zip(self._units, self._pieces, strict=True):
            grads = unit.reduced
            if grads.dtype != torch.float32:
                grads = torch.empty_like(grads, dtype=torch.float32)
            kernels.cast(grads, unit.reduced, scale=control.grad_scale)
            for s, piece in zip(unit.own_slices(), pieces, strict=True):
                piece.grad = _piece(grads, s)
        self._optimizer.step()
        for pieces in self._pieces:
            for piece in pieces:
                piece.grad = None
        self._take_states()

    def update(self, indices: Iterable[int]) -> None:
        for unit in (self._units[i] for i in indices):
            if self._skips:
                continue
            if unit.dtype != torch.float32:
                kernels.split_master(unit.updated, unit.full_precision())
            unit.publish()

    def state_dict(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for _, s, piece in self._all_pieces():
            state = self._optimizer.state.get(piece, {})
            elements = {k: (str(v.dtype), tuple(v.shape)) for k, v in state.items() if (id(piece), k) in self._views}
            rest = {k: v for k, v in state.items() if (id(piece), k) not in self._views}
            if state:
                parameters[s.slot.name] = {"elements": elements, "rest": rest}
        others = {key: value for key, value in self._optimizer.state.items() if not isinstance(key, Tensor)}
        return {"parameters": parameters, "others": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = dict(state.get("parameters", {}))
        self._optimizer.state.clear()
        self._views.clear()
        for unit in self._units:
            unit.states = {}
        for unit, s, piece in self._all_pieces():
            saved = parameters.pop(s.slot.name, None)
            if saved is None:
                continue
            own = self._optimizer.state[piece]
            for key, (dtype, shape) in saved["elements"].items():
                own[key] = self._view(unit, s, piece, key, getattr(torch, dtype.removeprefix("torch.")), tuple(shape))
            own.update(saved["rest"])
        if parameters:
            raise ValueError(f"the optimizer has no parameter '{next(iter(parameters))}', of which there is a state")
        self._optimizer.state.update(state.get("others", {}))

    def close(self) -> None:
        self._optimizer.state.clear()
        for group, given in zip(self._optimizer.param_groups, self._given, strict=True):
            group["params"] = given
        self._views.clear()

    def _all_pieces(self) -> Iterable[tuple[Unit, ShardSlice, Tensor]]:
        for unit, pieces in zip(self._units, self._pieces, strict=True):
            for s, piece in zip(unit.own_slices(), pieces, strict=True):
                yield unit, s, piece

    def _take_states(self) -> None:
        freed = FreedMemory()
        for unit, s, piece in self._all_pieces():
            state = self._optimizer.state.get(piece, {})
            for key, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value is not self._views.get((id(piece), key))
                    and _covers(value, piece)
                ):
                    view = self._view(unit, s, piece, key, value.dtype, tuple(value.shape))
                    state[key] = view.copy_(value)
                    freed.add(value.nbytes)

    def _view(
        self, unit: Unit, s: ShardSlice, piece: Tensor, key: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        flat = unit.states.get(key)
        if flat is None or flat.dtype != dtype:
            flat = unit.states[key] = unit.state_buffer(dtype)
        view = flat[s.in_shard].view(shape)
        self._views[id(piece), key] = view
        return view


def _covers(value: Tensor, piece: Tensor) -> bool:
    """Whether a state has an element for each element of a piece; a number of steps has not."""
    return value.shape == piece.shape or value.numel() == piece.numel() > 1


def _piece(flat: Tensor, s: ShardSlice) -> Tensor:
    piece = flat[s.in_shard]
    return piece.view(s.slot.shape) if s.numel == s.slot.numel else piece
