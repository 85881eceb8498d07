"""Weights of an engine, for files of Hugging Face."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from partita import Engine


def whole_state_dict(engine: Engine, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """The weights as the model computes with them, on rank 0, in memory of its CPU; empty elsewhere. A collective.

    Args:
        wanted: names of the tensors; None: all.
    """
    found: dict[str, Tensor] = {}
    for bucket in engine.weights():
        if engine.global_rank == 0:
            found |= {name: value.cpu() for name, value in bucket if wanted is None or name in wanted}
    return found
