"""Attributes by dotted names, which programs that replace layers ask for."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)


def recursive_getattr(model: nn.Module, module_name: str) -> Any:
    """`model.layers.3.attention` of "layers.3.attention". Raises AttributeError where there is no such name."""
    return attrgetter(module_name)(model)


def recursive_setattr(model: nn.Module, module_name: str, module: Any) -> None:
    """Puts `module` in the place of that name. Raises AttributeError where what it is in does not exist."""
    inside, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, inside) if inside else model, name, module)
