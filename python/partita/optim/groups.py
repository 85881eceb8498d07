"""The param groups of an optimizer in words, so that ranks can compare them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
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


class StepDigest:
    """What an optimizer takes a step with, as a number that ranks can compare.

    Most values are the objects that they were in the step before: only the others are put into words again.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: list[Any] = []  # the values of the step before; `_CHANGES` for those that can change in place
        self._words: list[str] = []  # of each of them
        self._inputs: tuple[Any, ...] = ()
        self._digest = 0

    def take(self, micro_batches: int, frozen: Sequence[str]) -> int:
        """A number below 2^20 that ranks have in common when they take the same step.

        Args:
            frozen: names of the parameters that have no part in the step.
        """
        keys = self._optimizer.defaults
        found = [group.get(key, _MISSING) for group in self._optimizer.param_groups for key in keys]
        inputs = (micro_batches, *frozen)
        if len(found) != len(self._seen) or not all(map(is_, found, self._seen)):
            self._put_into_words(found, list(keys))
        elif inputs == self._inputs:
            return self._digest
        self._inputs = inputs
        self._digest = digest_number("\0".join([*map(str, inputs), *self._words]), DIGESTS)
        return self._digest

    def _put_into_words(self, found: list[Any], keys: list[str]) -> None:
        if len(found) != len(self._seen):
            self._seen, self._words = [_CHANGES] * len(found), [""] * len(found)
        for i, value in enumerate(found):
            if value is not self._seen[i]:
                self._seen[i] = value if _is_constant(value) else _CHANGES
                self._words[i] = "" if value is _MISSING else f"{keys[i % len(keys)]}\0{in_words(value)}"


_MISSING, _CHANGES = object(), object()


def _is_constant(value: Any) -> bool:
    """Whether this object always has the same words."""
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return value is None or value is _MISSING or type(value) in (float, int, bool, str)


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
