"""How the shards are updated: natively, or by any element-wise torch optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from partita.device import kernels
from partita.optim.fused_adam import adam_group
from partita.optim.step_control import StepController
from partita.units import ShardSlice, Unit


class ShardUpdate(ABC):
    """Turns reduced gradients into new weights, in this rank's own range of every unit."""

    @abstractmethod
    def begin(self) -> None:
        """A step starts: read hyper-parameters that may have changed."""

    @abstractmethod
    def update(self, indices: Iterable[int]) -> None:
        """Writes the new weights of these units into `Unit.own_params`."""

    @abstractmethod
    def states(self, index: int, key: str) -> list[tuple[ShardSlice, Tensor]]:
        """An optimizer state in this rank's own range of a unit, by parameter; nothing if there is none (yet)."""


class NativeAdam(ShardUpdate):
    """One native pass over the units; the moments are float32."""

    def __init__(self, optimizer: Optimizer, units: list[Unit], controller: StepController) -> None:
        self._optimizer = optimizer
        self._units = units
        self._controller = controller
        self.exp_avg = [unit.state_buffer(torch.float32) for unit in units]
        self.exp_avg_sq = [unit.state_buffer(torch.float32) for unit in units]
        self._host_control = torch.empty(0)
        self._groups = [adam_group(group) for group in optimizer.param_groups]
        self._parts = [
            kernels.adam_part(
                grads=unit.reduced,
                master=unit.master,
                remainder=unit.remainder,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                params=None if unit.dtype == torch.float32 else unit.updated,
                segments=unit.segments,
            )
            for unit, exp_avg, exp_avg_sq in zip(units, self.exp_avg, self.exp_avg_sq, strict=True)
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

    def states(self, index: int, key: str) -> list[tuple[ShardSlice, Tensor]]:
        flat = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}.get(key)
        slices = self._units[index].own_slices()
        return [] if flat is None else [(s, flat[index][s.in_shard]) for s in slices]


class TorchUpdate(ShardUpdate):
    """A torch optimizer whose param groups hold pieces of the flat fp32 masters.

    A parameter that lies whole in this rank's range keeps its shape, so in stage 0 every optimizer sees what it would
    see without Partita. The optimizer runs once per step over all pieces: it may couple them.

    On a GPU the host waits for the decision whether the step is skipped: optimizers of others cannot read it there.
    """

    def __init__(self, optimizer: Optimizer, units: list[Unit], controller: StepController) -> None:
        self._optimizer = optimizer
        self._units = units
        self._controller = controller
        self._skips = False
        self._pieces = [[_piece(unit.full_precision(), s) for s in unit.own_slices()] for unit in units]
        for i, group in enumerate(optimizer.param_groups):
            group["params"] = [
                piece
                for unit, pieces in zip(units, self._pieces, strict=True)
                for s, piece in zip(unit.own_slices(), pieces, strict=True)
                if s.slot.group == i
            ]

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

    def update(self, indices: Iterable[int]) -> None:
        for unit in (self._units[i] for i in indices):
            if self._skips:
                continue
            if unit.dtype != torch.float32:
                kernels.split_master(unit.updated, unit.full_precision())
            unit.publish()

    def states(self, index: int, key: str) -> list[tuple[ShardSlice, Tensor]]:
        found = []
        for s, piece in zip(self._units[index].own_slices(), self._pieces[index], strict=True):
            state = self._optimizer.state.get(piece, {}).get(key)
            if isinstance(state, Tensor) and state.numel() == s.numel:
                found.append((s, state))
        return found


def _piece(flat: Tensor, s: ShardSlice) -> Tensor:
    piece = flat[s.in_shard]
    return piece.view(s.slot.shape) if s.numel == s.slot.numel else piece
