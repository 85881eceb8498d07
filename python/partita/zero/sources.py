"""What a program gives as weights: a state dict, or safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partita.device import HOST
from partita.device.kernels import why_no_memory

if TYPE_CHECKING:
    from partita.checkpoint.places import Place
    from partita.checkpoint.tensor_files import TensorFiles

WeightSource = Mapping[str, Tensor] | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class Weights:
    """What a source has, by name. read: gives a whole tensor. files: where it is read from, if it is files."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    dtype: Callable[[str], torch.dtype]
    files: TensorFiles | None = None


def open_source(source: WeightSource, exits: ExitStack) -> Weights:
    """What a source has.

    Raises:
        OSError, ValueError, CheckpointError: it cannot be read.
    """
    if isinstance(source, Mapping):
        _require_tensors(source)
        tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
        unreadable = next(((name, why) for name, value in tensors.items() if (why := _why_unreadable(value))), None)
        if unreadable is not None:
            raise ValueError(f"'{unreadable[0]}' in the weights {unreadable[1]}: give plain tensors with values")
        return weights_of(tensors)
    from partita.checkpoint.weight_files import open_weights  # with pydantic, which `import partita` leaves out

    files = exits.enter_context(open_weights(source))
    shapes = {place.name: stored.shape for place, stored in files.tensors.items()}
    return Weights(shapes, partial(_whole, files), lambda name: files.dtype(place_of(name)), files)


def weights_of(tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors of this process, as a source."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return Weights(shapes, tensors.__getitem__, lambda name: tensors[name].dtype)


def _whole(files: TensorFiles, name: str) -> Tensor:
    shape = files.tensors[place_of(name)].shape
    values = torch.empty(shape, dtype=files.dtype(place_of(name)), device=HOST)
    files.read(place_of(name), 0, values.view(-1))
    files.finish()
    return values


def place_of(name: str) -> Place:
    """Where files have a tensor of a model."""
    from partita.checkpoint.places import MODEL, Place

    return Place(MODEL, name)


def _why_unreadable(tensor: Tensor) -> str | None:
    """Why the values of a tensor of a state dict cannot be read on one rank alone."""
    if (reason := why_no_memory(tensor)) is not None:
        return reason
    return "has no memory" if tensor.numel() and not tensor.untyped_storage().nbytes() else None


def _require_tensors(source: Mapping[str, Any]) -> None:
    """Raises ValueError if the state dict is one of several things in a checkpoint; says where it may be."""
    if any(isinstance(value, Tensor) for value in source.values()):
        return
    nested = [name for name, value in source.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            "there is no tensor in this state dict, it is a checkpoint of several things: give the state dict in it, "
            f"which is under one of {', '.join(repr(name) for name in nested)}"
        )
