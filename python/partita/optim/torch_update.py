"""Updates by any element-wise torch optimizer, over pieces of the flat masters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita.device import HOST, FreedMemory, kernels, torch_threads
from partita.optim.step_control import StepController
from partita.optim.step_hooks import StepCall, step_without_hooks
from partita.optim.updates import ShardUpdate, States, other_kind
from partita.units import ShardSlice, Unit


class TorchUpdate(ShardUpdate):
    """A torch optimizer whose param groups hold pieces of the flat fp32 masters while it steps. Programs and hooks see
    the parameters there.

    A parameter that lies whole in this rank's range keeps its shape, so in stage 0 every optimizer sees what it would
    see without Partita. The optimizer runs once per step over all pieces: it may couple them.

    After each step, every tensor of the optimizer's state that has an element for each element of its piece is moved
    into `Unit.states`, and the optimizer has a view of it. A tensor that shares its memory with others stays where it
    is, as somebody writes there through another name; the state of such an optimizer cannot be saved.

    On a GPU the host waits for the decision whether the step is skipped: optimizers of others cannot read it there.
    """

    def __init__(
        self, optimizer: Optimizer, units: list[Unit], controller: StepController, host_threads: int | None = None
    ) -> None:
        self._optimizer = optimizer
        self._host_threads = host_threads
        self._units = units
        self._controller = controller
        self._skips = False
        # Some (Adagrad) make their state when constructed, and again when it is missing: the pieces take the place of
        # the parameters that it belongs to.
        optimizer.state.clear()
        self._pieces = [[_piece(unit.full_precision(), s) for s in unit.own_slices()] for unit in units]
        self._views: dict[tuple[int, str], Tensor] = {}  # of `Unit.states`, as the optimizer has them

    def begin(self, call: StepCall) -> None:
        control = self._controller.last
        self._skips = control.skip
        if self._skips:
            return
        for unit, pieces in zip(self._units, self._pieces, strict=True):
            unit.settle()
            grads = unit.reduced
            if grads.dtype != torch.float32:
                grads = torch.empty_like(grads, dtype=torch.float32)
            kernels.cast(grads, unit.reduced, scale=control.grad_scale, threads=self._host_threads)
            frozen = unit.frozen_slots()
            for s, piece in zip(unit.own_slices(), pieces, strict=True):
                piece.grad = None if s.slot in frozen else _piece(grads, s)
        with self._pieces_in_groups(), torch_threads(self._host_threads), self._where_pieces_are():
            step_without_hooks(self._optimizer, call)
        for pieces in self._pieces:
            for piece in pieces:
                piece.grad = None
        self._take_states()

    def update(self, indices: Iterable[int]) -> None:
        for unit in (self._units[i] for i in indices):
            if self._skips:
                continue
            if unit.dtype != torch.float32:
                kernels.split_master(unit.updated, unit.full_precision(), threads=self._host_threads)
            unit.publish()

    def state_dict(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for unit, s, piece in self._all_pieces():
            if state := self._optimizer.state.get(piece):
                moved = self._moved(piece)
                rest = {key: value for key, value in state.items() if key not in moved}
                shared = next((key for key in rest if s.slot in unit.kept.get(key, {})), None)
                if shared is not None:
                    raise ValueError(
                        f"{type(self._optimizer).__name__} keeps '{shared}' of parameter '{s.slot.name}' in memory "
                        "that it shares with something else, which could not be so after a restart: its state cannot "
                        "be saved"
                    )
                parameters[s.slot.name] = {
                    "elements": {key: (str(value.dtype), tuple(value.shape)) for key, value in moved.items()},
                    "rest": rest,
                    "beside": [k for k, v in rest.items() if isinstance(v, Tensor) and v.device == piece.device],
                }
        others = {key: value for key, value in self._optimizer.state.items() if not isinstance(key, Tensor)}
        return {"optimizer": self._kind(), "parameters": parameters, "others": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values_of(state)  # which refuses
        self._optimizer.state.clear()
        self._views.clear()
        for unit in self._units:
            unit.states, unit.kept = {}, {}
        for unit, s, piece in self._all_pieces():
            saved = state["parameters"].get(s.slot.name)
            if saved is None:
                continue
            own = self._optimizer.state[piece]
            for key, (dtype, shape) in saved["elements"].items():
                own[key] = self._view(unit, s, piece, key, getattr(torch, dtype.removeprefix("torch.")), tuple(shape))
            for key, values in saved.get("values", {}).items():
                own[key].copy_(values)
            own.update(saved["rest"])
            own.update((key, own[key].to(piece.device)) for key in saved["beside"])
        self._optimizer.state.update(state["others"])

    def from_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        for state in states:
            self._require_same_kind(state)
        saved: dict[str, Any] = {}
        for state in states:
            saved = {**state["parameters"], **saved}
        here = {s.slot.name: piece for _, s, piece in self._all_pieces()}
        parameters = {}
        for name in (name for name in here if name in saved):
            elements = saved[name]["elements"].items()
            shapes = {key: (dtype, _shape_for(shape, here[name])) for key, (dtype, shape) in elements}
            parameters[name] = {**saved[name], "elements": shapes}
        return {**states[min(rank, len(states) - 1)], "parameters": parameters}

    def keeping(self, state: dict[str, Any] | None, names: Collection[str], applied: int) -> dict[str, Any] | None:
        """See `ShardUpdate`. What these parameters have now is kept in the state with its values: loading makes new
        `Unit.states`."""
        if state is None:
            return None  # each parameter's state has its own count
        parameters = {name: saved for name, saved in state["parameters"].items() if name not in names}
        now = self.state_dict()["parameters"]
        for _, s, piece in self._all_pieces():
            if s.slot.name in names and s.slot.name in now:
                values = {key: view.clone() for key, view in self._moved(piece).items()}
                parameters[s.slot.name] = {**now[s.slot.name], "values": values}
        return {**state, "parameters": parameters}

    def values_of(self, state: dict[str, Any]) -> set[tuple[str, str]]:
        self._require_same_kind(state)
        pieces = {s.slot.name: piece for _, s, piece in self._all_pieces()}
        unknown = next((name for name in state["parameters"] if name not in pieces), None)
        if unknown is not None:
            raise ValueError(f"the optimizer has no parameter '{unknown}' on this rank, of which there is a state")
        for name, saved in state["parameters"].items():
            for key, (_, shape) in saved["elements"].items():
                if (numel := math.prod(shape)) != pieces[name].numel():
                    part = f"the part of this rank has {pieces[name].numel()}"
                    raise ValueError(f"'{key}' of parameter '{name}' has {numel} elements in the state, and {part}")
        return {
            (name, _flat_name(key, getattr(torch, dtype.removeprefix("torch."))))
            for name, saved in state["parameters"].items()
            for key, (dtype, _) in saved["elements"].items()
        }

    def states(self) -> States:
        found: States = {key: value for key, value in self._optimizer.state.items() if not isinstance(key, Tensor)}
        parameters = {s: p for unit in self._units for s, p in zip(unit.layout.slots, unit.parameters, strict=True)}
        for _, s, piece in self._all_pieces():
            if state := self._optimizer.state.get(piece):
                values = ((key, v.clone() if isinstance(v, Tensor) else v) for key, v in state.items())
                found[parameters[s.slot]] = dict(values)
        return found

    def close(self) -> None:
        self._optimizer.state.clear()
        self._views.clear()

    def _where_pieces_are(self) -> AbstractContextManager[Any]:
        """What the optimizer makes without naming a device is on the host where all of its pieces have been moved there
        from the program's default device."""
        moved = all(unit.offloads for unit in self._units) and torch.get_default_device() != HOST
        return torch.device(HOST) if moved else nullcontext()

    @contextmanager
    def _pieces_in_groups(self) -> Iterator[None]:
        groups = self._optimizer.param_groups
        given = [group["params"] for group in groups]
        for i, group in enumerate(groups):
            group["params"] = [piece for _, s, piece in self._all_pieces() if s.slot.group == i]
        try:
            yield
        finally:
            for group, parameters in zip(groups, given, strict=True):
                group["params"] = parameters

    def _all_pieces(self) -> Iterable[tuple[Unit, ShardSlice, Tensor]]:
        for unit, pieces in zip(self._units, self._pieces, strict=True):
            for s, piece in zip(unit.own_slices(), pieces, strict=True):
                yield unit, s, piece

    def _kind(self) -> str:
        return type(self._optimizer).__name__

    def _require_same_kind(self, state: dict[str, Any]) -> None:
        if "parameters" not in state or state.get("optimizer", self._kind()) != self._kind():
            raise other_kind(state, self._kind())

    def _moved(self, piece: Tensor) -> dict[str, Tensor]:
        """What of a piece's state is in `Unit.states`, by the optimizer's key."""
        state = self._optimizer.state.get(piece, {})
        views = {key: self._views.get((id(piece), key)) for key in state}
        return {key: view for key, view in views.items() if view is not None and view is state[key]}

    def _take_states(self) -> None:
        freed = FreedMemory()
        for unit, s, piece in self._all_pieces():
            state = self._optimizer.state.get(piece, {})
            for key, value in state.items():
                view = self._views.get((id(piece), key))
                if not isinstance(value, Tensor) or value is view or not _covers(key, value, piece):
                    continue
                if not _owns_its_memory(value, state):
                    unit.kept.setdefault(key, {})[s.slot] = value
                    continue
                if view is None or view.dtype != value.dtype or view.shape != value.shape:
                    view = self._view(unit, s, piece, key, value.dtype, tuple(value.shape))
                    freed.add(value.nbytes, value.device)
                state[key] = view.copy_(value)

    def _view(
        self, unit: Unit, s: ShardSlice, piece: Tensor, key: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        name = _flat_name(key, dtype)
        if name not in unit.states:
            unit.states[name] = unit.state_buffer(dtype)
        view = unit.states[name][s.in_shard].view(shape)
        self._views[id(piece), key] = unit.kept.setdefault(key, {})[s.slot] = view
        return view


def _covers(key: str, value: Tensor, piece: Tensor) -> bool:
    """Whether a state has an element for each element of a piece. A count of steps has not, even for one element."""
    return key != "step" and (value.shape == piece.shape or value.numel() == piece.numel() > 1)


def _owns_its_memory(value: Tensor, state: dict[str, Any]) -> bool:
    """Whether nothing else of a parameter's state, and no larger buffer of the optimizer's, has this memory."""
    storage = value.untyped_storage()
    others = sum(isinstance(v, Tensor) and v.untyped_storage()._cdata == storage._cdata for v in state.values())
    return storage.nbytes() == value.nbytes and others == 1


def _shape_for(shape: Sequence[int], piece: Tensor) -> tuple[int, ...]:
    """The shape that a state of this shape, of another part of the same parameter, has for a piece."""
    return tuple(shape) if math.prod(shape) == piece.numel() else tuple(piece.shape)


def _flat_name(key: str, dtype: torch.dtype) -> str:
    """The name in `Unit.states` of a state; optimizers may keep one state in several dtypes."""
    return key if dtype == torch.float32 else f"{key}:{str(dtype).removeprefix('torch.')}"


def _piece(flat: Tensor, s: ShardSlice) -> Tensor:
    piece = flat[s.in_shard]
    return piece.view(s.slot.shape) if s.numel == s.slot.numel else piece
