"""The param groups of an optimizer in words, so that ranks can compare them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from partita.comm import Entries, digest_number

DIGESTS = 1 << 20  # their squares, summed over all ranks, are exact in float64
LONGEST_TENSOR = 16


def group_entries(optimizer: Optimizer) -> Entries:
    """(name, value) of each hyper-parameter of each group."""
    return [
        (f"optimizer.param_groups[{i}]['{key}']", in_words(value))
        for i, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    ]


def digest_of_step(optimizer: Optimizer, micro_batches: int) -> int:
    """A number below 2^20 that ranks have in common when their groups and micro-batches of the step are the same."""
    words = [str(micro_batches)]
    for group in optimizer.param_groups:
        words.extend(_words(group))
    return digest_number("\0".join(words), DIGESTS)


def _words(group: dict[str, Any]) -> Iterator[str]:
    for key, value in group.items():
        if key != "params":
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
