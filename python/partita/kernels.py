"""Tensors to the native core: the one place that checks what an address points to."""

from __future__ import annotations

import torch
from torch import Tensor

from partita import _core
from partita._core import AdamGroup, Reduction, Segments, Span

DTYPES = {torch.float32: _core.DType.f32, torch.float16: _core.DType.f16, torch.bfloat16: _core.DType.bf16}
NO_PARAMS = Span(0, 0, _core.DType.f32)


def span(tensor: Tensor, name: str = "tensor") -> Span:
    """The memory of a contiguous CPU tensor of dtype float32, float16 or bfloat16; `name` is for the errors.

    Raises:
        TypeError: another dtype.
        ValueError: another device, or not contiguous.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TypeError(f"{name} is {tensor.dtype}: the native core computes in float32, float16 and bfloat16")
    return Span(address(tensor, name), tensor.numel(), dtype)


def address(tensor: Tensor, name: str = "tensor") -> int:
    """Where a contiguous CPU tensor begins; `name` is for the errors.

    Raises:
        ValueError: another device, or not contiguous.
    """
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on device '{tensor.device}': this version of the native core computes on the CPU")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


def pack(destination: Tensor, sources: list[Span], offsets: list[int], *, scale: float, accumulate: bool) -> None:
    """Gathers `sources` into the flat `destination`, source i from element `offsets[i]` on.

    destination = [destination +] source * scale, in fp32, rounded once. A span at address 0 counts as zeros.
    """
    _core.pack(span(destination, "destination"), sources, offsets, scale, accumulate, torch.get_num_threads())


def cast(destination: Tensor, source: Tensor, *, scale: float = 1.0, accumulate: bool = False) -> None:
    """destination = [destination +] source * scale, in fp32, rounded once; both of the same number of elements."""
    target, origin = span(destination, "destination"), span(source, "source")
    _core.cast(target, origin, scale, accumulate, torch.get_num_threads())


def reduce(destination: Tensor, sources: list[Tensor], reduction: Reduction) -> None:
    """The reduction of tensors of one size and dtype, in their order, in fp32, rounded once; `destination` may be one
    of them."""
    spans = [span(source, f"source {i}") for i, source in enumerate(sources)]
    _core.reduce(span(destination, "destination"), spans, reduction, torch.get_num_threads())


def add_sum_of_squares(total: Tensor, values: Tensor, segments: Segments) -> None:
    """Adds the sum of squares of the segments of `values` to `total` (float64, one element)."""
    if total.dtype != torch.float64 or total.numel() != 1:
        raise TypeError(f"the sum is kept in one float64, not in {total.numel()} x {total.dtype}")
    _core.norm(address(total, "total"), span(values, "values"), segments, torch.get_num_threads())


def adopt_written(master: Tensor, params: Tensor) -> None:
    """Elements of `params` that are not their fp32 master rounded were written by others: the master takes them."""
    written = params != master.to(params.dtype)
    master[written] = params[written].float()


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
    parameter. `control` is a `StepControl` in memory: uint8, of its number of bytes."""
    buffers = {"grads": grads, "master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if params is not None:
        buffers["params"] = params
    for name, buffer in buffers.items():
        if buffer.numel() != master.numel():
            raise ValueError(f"{name} has {buffer.numel()} elements, the master weights have {master.numel()}")
    if control.dtype != torch.uint8 or control.numel() != _core.StepControl.nbytes:
        raise TypeError(f"control is {_core.StepControl.nbytes} bytes, not {control.numel()} x {control.dtype}")
    spans = {name: span(buffer, name) for name, buffer in buffers.items()}
    _core.adam(
        spans["grads"],
        spans["master"],
        spans["exp_avg"],
        spans["exp_avg_sq"],
        spans.get("params", NO_PARAMS),
        segments,
        groups,
        address(control, "control"),
        torch.get_num_threads(),
    )
