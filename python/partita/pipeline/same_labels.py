"""Whether the first and the last rank of a pipeline read the same data: one has inputs, the other their labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from partita.pipeline.payload import tensors_of

NOTHING = 0.0  # what labels that cannot be compared give
_SAMPLES = 1024  # elements of a tensor that are looked at
_OFFSET = 100.0  # greater than any sum
_TOLERANCE = 1e-3  # labels may be computed, on devices of different kinds


def fingerprint(labels: Sequence[Any]) -> float:
    """A positive number that depends on the values of the labels of a step and on their order.

    NOTHING where no two values differ, as in what stands for labels that are not needed: None, zeros.
    """
    samples = [_sample(tensor) for tensor in tensors_of(list(labels))]
    values = torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *samples])
    values = values - values.mean()
    norm: float = torch.linalg.vector_norm(values).item()
    if not 0 < norm < float("inf"):
        return NOTHING
    weights = torch.sin(torch.arange(1, len(values) + 1, dtype=torch.float64, device="cpu") * 12.9898)
    return _OFFSET + float(values @ weights) / norm / sqrt(max(1, len(samples)))


def require_same_labels(first: float, last: float) -> None:
    """The labels beside the inputs of the first stage are those that the last stage uses.

    Args:
        first, last: the fingerprints.

    Raises:
        ValueError: they are not.
    """
    if NOTHING not in (first, last) and abs(first - last) > _TOLERANCE:
        raise ValueError(
            "the rank of the first stage has read other labels than the rank of the last one, so the labels would not "
            "be those of the inputs. A DataLoader that shuffles draws from torch's generator, whose state differs "
            "between ranks as soon as a layer of one is random: give data as training_data to initialize(), or give "
            "the DataLoader a generator of its own with the same seed on all ranks. Where the labels of the first "
            "stage are not the right ones on purpose, make them None"
        )


def _sample(leaf: Tensor) -> Tensor:
    """Some elements of a tensor, in float64 on the CPU."""
    if leaf.is_complex() or leaf.layout is not torch.strided:
        return torch.empty(0, dtype=torch.float64, device="cpu")
    flat = leaf.detach().reshape(-1)
    return flat[:: max(1, -(-len(flat) // _SAMPLES))].to("cpu", torch.float64)
