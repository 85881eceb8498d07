"""The param groups of an optimizer in words, so that ranks can compare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from partita.comm import Entries, digest_number

DIGESTS = 1 << 20  # their squares, summed over all ranks, are exact in float64
LONGEST_TENSOR = 16


def group_entries(optimizer: Optimizer) -> Entries:
    """(name, value) of each hyper-parameter of each group. What a program keeps there besides is its own."""
    return [
        (f"optimizer.param_groups[{i}]['{key}']", in_words(group[key]))
        for i, group in enumerate(optimizer.param_groups)
        for key in optimizer.defaults
        if key in group
    ]


def digest_of_step(optimizer: Optimizer, micro_batches: int, frozen: Iterable[str]) -> int:
    """A number below 2^20 that ranks have in common when they take the same step.

    Args:
        frozen: names of the parameters that have no part in the step.
    """
    words = [str(micro_batches), *frozen]
    for group in optimizer.param_groups:
        words.extend(_words(group, optimizer.defaults))
    return digest_number("\0".join(words), DIGESTS)


def _words(group: dict[str, Any], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if key in group:
            value = group[key]
            yield key
            yield repr(value) if type(value) in (float, bool, str) else in_words(value)


def in_words(value: Any) -> str:
    """The same text for the same value on every rank. Numbers on a GPU, for which the host would wait, are left out."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return repr(value)
    if isinstance(value, int | float):
        return repr(float(value))
    if isinstance(value, list | tuple):
        return f"({', '.join(in_words(item) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {in_words(item)}' for key, item in value.items())}}}"
    if isinstance(value, Tensor) and value.is_cpu and value.numel() <= LONGEST_TENSOR:
        return in_words(value.tolist())
    return f"a {type(value).__name__}"
