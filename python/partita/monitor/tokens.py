"""How many tokens a batch has, as far as its shapes tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


def tokens_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The elements of `input_ids`, or of the first tensor if that has whole numbers in two dimensions [batch, length].

    0: neither. Padding counts. No value is read, so nobody waits for a GPU.
    """
    tensor = _named([kwargs, *args])
    if tensor is None:
        tensor = _first([*args, *kwargs.values()])
        if tensor is None or tensor.dim() != 2 or not _is_whole(tensor):
            return 0
    return tensor.numel()


def _named(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Mapping) and isinstance(found := value.get("input_ids"), Tensor):
            return found
        if isinstance(value, tuple | list) and (inner := _named(value)) is not None:
            return inner
    return None


def _first(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
        if (found := _first(inside)) is not None:
            return found
    return None


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize < 2)
