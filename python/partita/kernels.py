"""Tensors to the native core: the one place that checks what an address points to."""

from __future__ import annotations

import torch
from torch import Tensor

from partita import _core
from partita._core import AdamGroup, Segments, Span

DTYPES = {torch.float32: _core.DType.f32, torch.float16: _core.DType.f16, torch.bfloat16: _core.DType.bf16}
NO_PARAMS = Span(0, 0, _core.DType.f32)


def span(tensor: Tensor) -> Span:
    """The memory of a contiguous CPU tensor of dtype float32, float16 or bfloat16.

    Raises:
        TypeError: another dtype.
        ValueError: another device, or not contiguous.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TypeError(f"{tensor.dtype} tensor: the native core computes in float32, float16 and bfloat16")
    if not tensor.is_cpu:
        raise ValueError(f"tensor on {tensor.device}: this version of the native core computes on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    return Span(tensor.data_ptr(), tensor.numel(), dtype)


def pack(destination: Tensor, sources: list[Span], offsets: list[int], *, scale: float, accumulate: bool) -> None:
    """Gathers `sources` into the flat `destination`, source i from element `offsets[i]` on.

    destination = [destination +] source * scale, in fp32, rounded once. A span at address 0 counts as zeros.
    """
    _core.pack(span(destination), sources, offsets, scale, accumulate, torch.get_num_threads())


def cast(destination: Tensor, source: Tensor, *, scale: float = 1.0, accumulate: bool = False) -> None:
    """destination = [destination +] source * scale, in fp32, rounded once; both of the same number of elements."""
    _core.cast(span(destination), span(source), scale, accumulate, torch.get_num_threads())


def add_sum_of_squares(total: Tensor, values: Tensor, segments: Segments) -> None:
    """Adds the sum of squares of the segments of `values` to `total` (float64, one element)."""
    if total.dtype != torch.float64 or total.numel() != 1:
        raise TypeError(f"the sum is kept in one float64, not in {total.numel()} x {total.dtype}")
    _core.norm(total.data_ptr(), span(values), segments, torch.get_num_threads())


def is_finite(tensor: Tensor) -> bool:
    """Whether every element of a tensor is finite; one pass, any dtype and strides."""
    return bool(torch.isfinite(tensor).all())


def adam(
    *,
    grads: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    params: Tensor | None,
    segments: Segments,
    groups: list[AdamGroup],
    control: Tensor,
) -> None:
    """One Adam or AdamW update of flat buffers of equal size (see `adam.h`); `params` None: the master is the
    parameter."""
    _core.adam(
        span(grads),
        span(master),
        span(exp_avg),
        span(exp_avg_sq),
        NO_PARAMS if params is None else span(params),
        segments,
        groups,
        control.data_ptr(),
        torch.get_num_threads(),
    )
