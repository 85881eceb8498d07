"""Weights of an engine, for files of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from partita import Engine
from partita.zero import AbsentParameterError


def whole_state_dict(engine: Engine, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """The weights as the model computes with them, on rank 0, in memory of its CPU; empty elsewhere. A collective.

    Args:
        wanted: names of the tensors; None: all.
    """
    found: dict[str, Tensor] = {}
    for bucket in engine.weights():
        if engine.global_rank == 0:
            found |= {name: value.cpu() for name, value in bucket if wanted is None or name in wanted}
    first = _first_names(engine)
    return {name: found[first.get(name, name)] for name in found}


def has_values(model: nn.Module) -> bool:
    """Whether this rank has the values of all parameters. Those that `zero.Init` has partitioned are elsewhere."""
    try:
        for parameter in model.parameters():
            parameter.detach()
    except AbsentParameterError:
        return False
    return True


def _first_names(engine: Engine) -> dict[str, str]:
    """Of each name of a shared parameter, the first one: whoever writes files sees one tensor then."""
    by_parameter: dict[int, str] = {}
    named = engine.module.named_parameters(remove_duplicate=False)
    return {name: by_parameter.setdefault(id(parameter), name) for name, parameter in named}
