"""Whole parameters, gradients and optimizer states of a partitioned model, to look at and to change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.device import kernels
from partita.optim import ShardedOptimizer
from partita.units import GradientReducer, GradState, ParameterGathers, ShardSlice, Slot, Unit

Pieces = list[tuple[ShardSlice, Tensor]]


class ParameterAccess:
    """What `partita.utils` asks an engine for. All methods are collectives, in every ZeRO stage.

    Args:
        grad_factor: what makes stored gradients the mean over micro-batches and ranks, not scaled.
    """

    def __init__(
        self,
        units: list[Unit],
        optimizer: ShardedOptimizer | None,
        reducer: GradientReducer,
        gathers: ParameterGathers,
        communicator: Communicator,
        grad_factor: Callable[[], float],
    ) -> None:
        self._units = units  # the engine's own list, which it empties when it is destroyed
        self._index = {id(unit): i for i, unit in enumerate(units)}
        self._optimizer = optimizer
        self._reducer = reducer
        self._gathers = gathers
        self._communicator = communicator
        self._grad_factor = grad_factor

    def trains(self, unit: Unit) -> bool:
        """Whether the engine still trains this unit."""
        return any(unit is own for own in self._units)

    def weights(self, unit: Unit, parameter: nn.Parameter) -> Tensor | None:
        """The fp32 master weights."""
        self._gathers.wait()
        unit.adopt_written_parameters()
        return self._whole(unit, parameter, _pieces(unit, parameter, unit.full_precision()))

    def set_weights(self, unit: Unit, parameter: nn.Parameter, value: Tensor) -> None:
        """The master weights, and the parameters with them, take fp32 values that are the same on all ranks."""
        self._gathers.wait()
        unit.adopt_written_parameters()
        self._communicator.barrier()  # nobody computes with the old ones any more
        masters = unit.full_precision()
        _copy_into(_pieces(unit, parameter, masters), value)
        if unit.dtype != torch.float32:
            kernels.split_master(unit.updated, masters, unit.remainder)
        unit.publish()
        if unit.residence.all_gathers_updates and len(unit.own) < unit.layout.numel:
            self._communicator.all_gather(unit.params).wait()
        self._communicator.barrier()

    def gradient(self, unit: Unit, parameter: nn.Parameter) -> Tensor | None:
        """The mean gradient of this step in fp32, before clipping; None if there is none."""
        if not self._has_gradients(unit):
            return None
        own = [(s, piece.float() * self._grad_factor()) for s, piece in _pieces(unit, parameter, unit.reduced)]
        return self._whole(unit, parameter, own)

    def set_gradient(self, unit: Unit, parameter: nn.Parameter, value: Tensor) -> None:
        """The step will use this mean gradient."""
        if not self._has_gradients(unit):
            raise RuntimeError("there is no gradient to replace: call this between engine.backward() and engine.step()")
        _copy_into(_pieces(unit, parameter, unit.reduced), value.float() / self._grad_factor())

    def state(self, unit: Unit, parameter: nn.Parameter, key: str) -> Tensor | None:
        """An optimizer state with the parameter's shape, in fp32; None if there is none yet."""
        return self._whole(unit, parameter, self._states(unit, parameter, key), may_miss=True)

    def set_state(self, unit: Unit, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """An optimizer state takes values that are the same on all ranks."""
        pieces = self._states(unit, parameter, key)
        if not self._everywhere(bool(pieces) or not _pieces(unit, parameter, unit.reduced)):
            raise KeyError(f"the optimizer has no state '{key}' of parameter '{unit.name_of(parameter)}' (yet)")
        _copy_into(pieces, value)

    def _states(self, unit: Unit, parameter: nn.Parameter, key: str) -> Pieces:
        if self._optimizer is None:
            return []
        slot = _slot(unit, parameter)
        return [(s, piece) for s, piece in self._optimizer.states(self._index[id(unit)], key) if s.slot == slot]

    def _has_gradients(self, unit: Unit) -> bool:
        self._reducer.wait()
        if unit.grad_state is GradState.LOCAL:
            raise RuntimeError(
                "gradients of an unfinished accumulation are this rank's only: ask after the backward of the last "
                "micro-batch of a step"
            )
        return unit.grad_state is GradState.REDUCED

    def _everywhere(self, condition: bool) -> bool:
        missing = torch.full((1,), float(not condition), device=self._communicator.device)
        self._communicator.all_reduce(missing).wait()
        return not missing.item()

    def _whole(self, unit: Unit, parameter: nn.Parameter, own: Pieces, may_miss: bool = False) -> Tensor | None:
        """Every rank's pieces of a parameter."""
        slot = _slot(unit, parameter)
        if may_miss and not self._everywhere(bool(own) or not _pieces(unit, parameter, unit.reduced)):
            return None
        whole = torch.empty(slot.numel, dtype=torch.float32, device=unit.params.device)
        for s, piece in own:
            whole[s.in_parameter] = piece.reshape(-1)
        if len(unit.own) < unit.layout.numel:
            for rank in range(self._communicator.world_size):
                for s in unit.layout.slices(unit.layout.shard_range(rank)):
                    if s.slot == slot:
                        self._communicator.broadcast(whole[s.in_parameter], rank).wait()
        return whole.view(slot.shape)


def _slot(unit: Unit, parameter: nn.Parameter) -> Slot:
    return next(s for s, p in zip(unit.layout.slots, unit.parameters, strict=True) if p is parameter)


def _pieces(unit: Unit, parameter: nn.Parameter, flat: Tensor) -> Pieces:
    """This rank's pieces of a parameter in a flat buffer of its own range."""
    slot = _slot(unit, parameter)
    own = [s for s in unit.own_slices() if s.slot == slot]
    return [(s, flat[s.in_shard]) for s in own]


def _copy_into(pieces: Pieces, value: Tensor) -> None:
    flat = value.reshape(-1)
    for s, piece in pieces:
        piece.view(-1).copy_(flat[s.in_parameter])
