"""Where tensors are in a checkpoint: in which files, and under which names. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from partita.model import DTYPE_NAMES, WEIGHT

MODEL, OPTIMIZER = "model", "optimizer"  # what the names of files begin with
REMAINDER, PARAMETER = "remainder", "parameter"
RESERVED = (WEIGHT, REMAINDER, PARAMETER)  # what an optimizer's own quantities cannot be called


@dataclass(frozen=True)
class Place:
    """A tensor in a checkpoint: in which files it is, and its name there."""

    stem: str
    name: str


def stem_of(file: str) -> str:
    """What the name of a .safetensors file begins with."""
    return file.removesuffix(".safetensors").partition("-")[0]


def of_quantity(name: str, parameter: Place) -> Place:
    """Where a quantity of a parameter is."""
    return Place(OPTIMIZER, f"{name}/{parameter.name}")


def dtype_name(dtype: torch.dtype) -> str:
    """In a file's header; another dtype is refused by its own name when files are laid out."""
    return DTYPE_NAMES.get(dtype, str(dtype))


def layer_of(name: str) -> int:
    """The number of the layer with which the name of a parameter begins; others come after all layers."""
    first = name.removeprefix(f"{PARAMETER}/").partition(".")[0]
    return int(first) if first.isdecimal() else sys.maxsize
