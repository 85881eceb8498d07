"""Byte floors, floating-point operations and the search for the largest model: arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

STEP_FLOOR_BYTES = 30  # 16-bit gradients read twice, everything else once
STATE_BYTES = {"fp32": 16, "split": 14}  # per parameter: 16-bit weight and gradient, master, two moments
H100_BF16_FLOPS = 989e12  # dense, H100 SXM and H200


@dataclass(frozen=True)
class Sizes:
    """Of a GPT whose output layer is its embedding."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int

    @property
    def parameters(self) -> int:
        """12 width^2 and 13 width per block (weights; biases and norms), the embeddings, the last norm."""
        return self.outside_blocks + self.layers * self.per_block

    @property
    def per_block(self) -> int:
        return 12 * self.width**2 + 13 * self.width

    @property
    def outside_blocks(self) -> int:
        return (self.vocabulary + self.context + 2) * self.width


def training_flops_per_token(sizes: Sizes, length: int) -> float:
    """6 per parameter, and for causal attention 6 x layers x width x length, as llm.c counts them."""
    return 6 * sizes.parameters + 6 * sizes.layers * sizes.width * length


def largest_that_fits(fits: Callable[[int], bool], limit: int, guess: int, tolerance: int, tries: int) -> int:
    """The largest number found for which `fits` holds, given that it fails above `limit`; 0 when none was found.

    Begins at `guess`, goes down in doubling strides until something fits, then halves the interval down to `tolerance`.
    """
    low, high, stride = 0, limit + 1, max(1, limit - guess)
    trial = guess
    for _ in range(tries):
        if fits(trial):
            low = trial
        else:
            high = trial
        if high - low <= (tolerance if low else 1):
            break
        trial = (low + high) // 2 if low else max(1, high - stride)
        stride *= 2
    return low
