"""Whole parameters, gradients and optimizer states of a partitioned model, to look at and to change."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from partita.comm import any_rank
from partita.model.loss_scaling import LossScaling
from partita.run import Run
from partita.units import GradientReducer, GradState, ParameterGathers, ParameterLifetimes, ShardSlice, Slot, Unit

Pieces = list[tuple[ShardSlice, Tensor]]


class ParameterAccess:
    """What `partita.utils` asks of a model in training. All methods are collectives, in every ZeRO stage."""

    def __init__(
        self,
        units: list[Unit],
        reducer: GradientReducer,
        gathers: ParameterGathers,
        lifetimes: ParameterLifetimes,
        run: Run,
        scaling: LossScaling,
    ) -> None:
        self._unit_of = {p: unit for unit in units for p in unit.parameters}
        self._reducer = reducer
        self._gathers = gathers
        self._lifetimes = lifetimes
        self._run = run
        self._communicator = run.grid.data
        self._scaling = scaling

    def unit_of(self, parameter: nn.Parameter) -> Unit:
        """Where a parameter lies."""
        return self._unit_of[parameter]

    def calling(self, name: str) -> AbstractContextManager[None]:
        """The block of the call `name`; other ranks in other calls are named."""
        if self._run.policy.shards_states:
            return self._communicator.call_of_all(name)
        return self._communicator.calls.inside(name)  # one rank alone may ask for what it has

    def weights(self, unit: Unit, parameter: nn.Parameter) -> Tensor | None:
        """The fp32 master weights."""
        self._gathers.wait()
        unit.adopt_written_parameters()
        return self._whole(unit, parameter, _pieces(unit, parameter, unit.full_precision()))

    def set_weights(self, unit: Unit, parameter: nn.Parameter, value: Tensor) -> None:
        """The master weights, and the parameters with them, take fp32 values that are the same on all ranks."""
        self._gathers.wait()
        self._lifetimes.release_all()  # what an evaluation left gathered would keep the old values
        unit.adopt_written_parameters()
        masters = unit.full_precision()
        if masters is unit.master:
            masters = masters.clone()  # another rank may compute with the old ones
        _copy_into(_pieces(unit, parameter, masters), value)
        unit.write_full_precision(masters)

    def gradient(self, unit: Unit, parameter: nn.Parameter) -> Tensor | None:
        """The mean gradient of this step in fp32, before clipping; None if there is none."""
        if not self._has_gradients(unit, parameter):
            return None
        own = [(s, piece.float() * self._grad_factor()) for s, piece in _pieces(unit, parameter, unit.reduced)]
        return self._whole(unit, parameter, own)

    def set_gradient(self, unit: Unit, parameter: nn.Parameter, value: Tensor) -> None:
        """The step will use this mean gradient."""
        if not self._has_gradients(unit, parameter):
            raise RuntimeError("there is no gradient to replace: call this between engine.backward() and engine.step()")
        _copy_into(_pieces(unit, parameter, unit.reduced), value.float() / self._grad_factor())

    def state(self, unit: Unit, parameter: nn.Parameter, key: str) -> Tensor | None:
        """An optimizer state with the parameter's shape, in fp32; None if there is none yet."""
        return self._whole(unit, parameter, self._states(unit, parameter, key), may_miss=True)

    def set_state(self, unit: Unit, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """An optimizer state takes values that are the same on all ranks."""
        pieces = self._states(unit, parameter, key)
        if self._misses(unit, parameter, pieces):
            raise KeyError(f"the optimizer has no state '{key}' of parameter '{unit.name_of(parameter)}' (yet)")
        unit.will_write()
        _copy_into(pieces, value)

    def _states(self, unit: Unit, parameter: nn.Parameter, key: str) -> Pieces:
        kept = unit.kept.get(key, {})
        return [(s, kept[s.slot]) for s, _ in _pieces(unit, parameter, unit.reduced) if s.slot in kept]

    def _grad_factor(self) -> float:
        """What turns a stored gradient into the mean over micro-batches and ranks, not scaled."""
        return self._run.mean / self._scaling.value()

    def _has_gradients(self, unit: Unit, parameter: nn.Parameter) -> bool:
        self._reducer.heed()
        self._reducer.take_written()
        self._reducer.wait()
        if unit.grad_state is GradState.LOCAL:
            raise RuntimeError(
                f"the gradient of parameter '{unit.name_of(parameter)}' is this rank's only: ranks have not added up "
                "those of an unfinished accumulation, or of backwards inside no_sync(); ask after the backward of the "
                "last micro-batch of a step"
            )
        return unit.grad_state is GradState.REDUCED

    def _misses(self, unit: Unit, parameter: nn.Parameter, own: Pieces) -> bool:
        """Whether a rank that owns a piece of the parameter lacks what it should have of it."""
        return any_rank(self._communicator, not own and bool(_pieces(unit, parameter, unit.reduced)))

    def _whole(self, unit: Unit, parameter: nn.Parameter, own: Pieces, may_miss: bool = False) -> Tensor | None:
        """Every rank's pieces of a parameter."""
        slot = _slot(unit, parameter)
        if may_miss and self._misses(unit, parameter, own):
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


class _Access:
    """Who gives access to a parameter: an attribute of the parameter that is not pickled with it."""

    def __init__(self, access: ParameterAccess) -> None:
        self.find = weakref.ref(access)  # a model may outlive its engine

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # what torch.load() takes with weights_only, too


class GivenAccess:
    """Parameters that say who gives access to them, until this is closed."""

    def __init__(self, access: ParameterAccess, parameters: Iterable[nn.Parameter]) -> None:
        self._access = access
        self._parameters = list(parameters)
        for parameter in self._parameters:
            parameter._partita_access = _Access(access)  # type: ignore[attr-defined]

    def close(self) -> None:
        """The parameters say nothing any more."""
        for parameter in self._parameters:
            if access_of(parameter) is self._access:  # not another engine's by now
                del parameter._partita_access  # type: ignore[attr-defined]
        self._parameters = []


def access_of(parameter: nn.Parameter) -> ParameterAccess | None:
    """Who gives access to a parameter; None if no engine trains it."""
    given = getattr(parameter, "_partita_access", None)
    return given.find() if isinstance(given, _Access) else None
