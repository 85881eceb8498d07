"""The weights of a model in training, as they go into files: which tensors, and the part that this rank has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partita.checkpoint.layout import TensorSpec
from partita.checkpoint.pieces import own_range, shares
from partita.checkpoint.places import REMAINDER, dtype_name, layer_of
from partita.comm import raise_together, text_by_rank
from partita.device import kernels
from partita.model import DTYPE_NAMES, WEIGHT, TrainState
from partita.units import FlatParameters, Unit

Read = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Run:
    """Elements of a tensor, of all names that it has.

    first: of them in the flattened tensor. read: a range of these elements, flat, in the dtype of the file.
    """

    names: list[str]
    first: int
    numel: int
    read: Read


class ModelWeights:
    """What is in a model's state dict, under each of its names.

    Together the ranks have each element of each tensor once. What is neither a parameter of the run nor shared by its
    ranks, such as a buffer, is the first rank's of those that have the layers. Of tied parameters, each part of the
    model has its own names. A collective where layers are on several ranks.

    Args:
        dtype: of floating-point tensors; None: as the model computes. torch.float32 and torch.float64 take the fp32
            masters of what is trained.

    Attributes:
        specs: the tensors of all ranks, in the order of the model's state dict.

    Raises:
        ValueError: something in the state dict is no tensor, or files have no such dtype; names it.
    """

    def __init__(self, state: TrainState, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._state = state
        self._values: dict[str, Any] = {}
        for module in state.modules:
            self._values.update(module.state_dict(keep_vars=True))
        self._names: dict[int, list[str]] = {}  # by the identity of the tensor
        error, own = None, list[TensorSpec]()
        try:
            _require_floating(dtype)
            own += map(self._spec, self._values.items())
        except ValueError as refused:
            error = refused
        raise_together(state.world, error)
        self.specs = _of_all_ranks(state, own)

    def runs(self) -> Iterator[Run]:
        """What this rank has."""
        parameters = self._state.parameters()
        named = {name: self._names.get(id(p), []) for name, p in parameters.items()}
        for quantity in self._state.quantities():
            if quantity.name == WEIGHT:
                for slot, first, where in shares(quantity):
                    read = self._reader(quantity.unit, where)
                    yield Run(named[slot.name], first, where.stop - where.start, read)
        for name, tensor in self._state.untrained().items():
            own = own_range(self._state, tensor)
            yield Run(named[name], own.start, own.stop - own.start, self._converting(_flat(tensor)[own]))
        known = {id(p) for p in parameters.values()}
        is_first = self._state.data.rank == 0
        others = {id(v): v for v in self._values.values() if id(v) not in known} if is_first else {}
        for key, value in others.items():
            yield Run(self._names[key], 0, value.numel(), self._converting(_flat(value)))

    def _spec(self, item: tuple[str, Any]) -> TensorSpec:
        """Of a tensor of this rank, which may be written."""
        name, value = item
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"'{name}' in the model's state dict is a {kind}: only tensors are written")
        self._names.setdefault(id(value), []).append(name)
        spec = TensorSpec(name, dtype_name(self._written(value.dtype)), tuple(value.shape))
        _ = spec.nbytes  # refuses a dtype
        return spec

    def _written(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _reader(self, unit: FlatParameters, where: slice) -> Read:
        if self.dtype in (torch.float32, torch.float64) and isinstance(unit, Unit):
            stored = unit.stored_weights()
            if WEIGHT in stored:
                return self._converting(stored[WEIGHT][where])
            if REMAINDER in stored:
                return partial(_joined, stored[""][where], stored[REMAINDER][where], self.dtype)
        return self._converting(unit.own_params[where])

    def _converting(self, values: Tensor) -> Read:
        return partial(_converted, values, self._written(values.dtype))


def _require_floating(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (dtype in DTYPE_NAMES and dtype.is_floating_point):
        raise ValueError(f"dtype = {dtype}: weights are written in a floating-point dtype that safetensors has")


def _of_all_ranks(state: TrainState, own: Iterable[TensorSpec]) -> list[TensorSpec]:
    """A collective."""
    texts = text_by_rank(state.pipe, json.dumps([(spec.name, spec.dtype, spec.shape) for spec in own]))
    specs = [TensorSpec(name, dtype, tuple(shape)) for text in texts for name, dtype, shape in json.loads(text)]
    return specs if len(texts) == 1 else sorted(specs, key=lambda spec: layer_of(spec.name))


def _converted(values: Tensor, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    return values[begin:end].to(dtype)


def _joined(upper: Tensor, remainder: Tensor, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    joined = torch.empty(end - begin, dtype=torch.float32, device=upper.device)
    kernels.join_master(joined, upper[begin:end], remainder[begin:end])
    return joined.to(dtype)


def _flat(tensor: Tensor) -> Tensor:
    """The bits of a conjugate view are not those of its memory."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
