"""Tensors to the native core: the one place that checks what an address points to."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from partita import _core
from partita._core import AdamGroup, AdamPart, LossScaler, NormPart, Reduction, Segments, Span, Stream

DTYPES = {torch.float32: _core.DType.f32, torch.float16: _core.DType.f16, torch.bfloat16: _core.DType.bf16}
NativePart = TypeVar("NativePart", NormPart, AdamPart)
NOTHING = Span(0, 0, _core.DType.f32)
# Where a storage has no memory, the address is that of the tensor in it, counted from 0: less than this.
NO_MEMORY_BELOW = 1 << 40
_device, _layout, _is_nested = attrgetter("device"), attrgetter("layout"), attrgetter("is_nested")
_OWN_MEMORY = Tensor.__torch_dispatch__  # of a class whose tensors compute with the memory that they have


def span(tensor: Tensor, name: str = "tensor") -> Span:
    """The memory of a contiguous tensor of dtype float32, float16 or bfloat16; `name` is for the errors.

    Raises:
        TypeError: another dtype.
        ValueError: as for `address`.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TypeError(f"{name} is {tensor.dtype}: the native core computes in float32, float16 and bfloat16")
    return Span(address(tensor, name), tensor.numel(), dtype)


def address(tensor: Tensor, name: str = "tensor") -> int:
    """Where a contiguous tensor begins; `name` is for the errors.

    Raises:
        ValueError: a device without kernels, not contiguous, or no memory with the values: see `why_no_address`.
    """
    if not (tensor.is_cpu or tensor.is_cuda):
        raise _no_kernels(tensor, name)
    is_strided = tensor.layout is torch.strided
    if is_strided and not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    pointer = tensor.data_ptr() if is_strided and type(tensor).__torch_dispatch__ is _OWN_MEMORY else 0
    # The rest of what `why_no_address` finds has the address 0: gradients pass here in every step, so they are looked
    # at briefly.
    if (pointer < NO_MEMORY_BELOW and _is_nowhere(tensor, pointer)) or tensor.is_neg() or tensor.is_nested:
        reason = why_no_address(tensor) or f"of shape {tuple(tensor.shape)} has no memory: its values are elsewhere"
        raise ValueError(f"{name} {reason}; the native core needs a tensor with memory of its own")
    return pointer


def _addresses(tensors: list[Tensor], name: str) -> list[int]:
    """The same for many tensors. They are looked at one by one only where one of them may have no address."""
    if set(map(type, tensors)) == {Tensor} and set(map(_layout, tensors)) == {torch.strided}:
        pointers = list(map(Tensor.data_ptr, tensors))
        others = any(map(Tensor.is_neg, tensors)) or any(map(_is_nested, tensors))
        if not others and min(pointers) >= NO_MEMORY_BELOW and all(map(Tensor.is_contiguous, tensors)):
            return pointers
    return [address(tensor, name) for tensor in tensors]


def memory(tensor: Tensor, name: str = "tensor") -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must live as long as the view. Writes go into the tensor.

    `tensor.numpy()` would tie a storage to its size.

    Raises:
        ValueError: as for `address`, or the tensor is not on the CPU.
    """
    if not tensor.is_cpu:
        raise _no_kernels(tensor, name)
    if not tensor.nbytes:
        return memoryview(b"")
    place = (ctypes.c_ubyte * tensor.nbytes).from_address(address(tensor, name))
    values: Any = np.ctypeslib.as_array(place)
    return memoryview(values)


def _no_kernels(tensor: Tensor, name: str) -> ValueError:
    return ValueError(f"{name} is on device '{tensor.device}': the native core computes on the CPU and on CUDA devices")


def _is_nowhere(tensor: Tensor, pointer: int) -> bool:
    """Whether a tensor with this address has elements, and no memory for them."""
    return pointer == tensor.storage_offset() * tensor.element_size() and tensor.numel() > 0


def why_no_address(tensor: Tensor) -> str | None:
    """Why the memory at a tensor's address is not its values, as the end of a sentence; None if it is, or would be if
    its storage had memory."""
    if (reason := why_no_memory(tensor)) is not None:
        return reason
    return (
        "has memory with other values (a lazy negation or conjugate)" if tensor.is_neg() or tensor.is_conj() else None
    )


def why_no_memory(tensor: Tensor) -> str | None:
    """Why a tensor has no memory of its own, as the end of a sentence; None if it has, or would have if its storage
    had.

    A DTensor, a FakeTensor and the like have a shape and a device as plain tensors have, and the address 0.
    """
    if is_lazy(tensor):
        return "has no shape yet, as its module waits for a first forward"
    if _is_made_of_others(tensor):
        return f"is a {type(tensor).__name__}, which is made of other tensors"
    with torch._C.DisableTorchFunctionSubclass():  # an absent parameter's class would refuse some of these questions
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"has the layout {'nested' if tensor.is_nested else tensor.layout}"
        if tensor.is_meta:
            return "is on the meta device"
        if torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "is a tensor of a transformation (torch.func)"
        return "is a lazy zero" if tensor._is_zerotensor() else None


def _is_made_of_others(tensor: Tensor) -> bool:
    """Whether the tensor's class computes with other tensors in place of the memory of this one."""
    return type(tensor).__torch_dispatch__ is not _OWN_MEMORY


def _where(name: str, tensor: Tensor, threads: int | None = None, **others: Tensor | None) -> int | Stream:
    """Where work on these tensors is done: on how many threads, or on which stream, the current one of their device.

    Args:
        threads: on the CPU; None: as many as torch uses. So it is for all functions here.

    Raises:
        ValueError: they are not all on one device, or on one without kernels.
    """
    device = tensor.device
    for other_name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{other_name} is on device '{other.device}' but {name} is on '{device}'")
    if tensor.is_cpu:
        return torch.get_num_threads() if threads is None else threads
    if not tensor.is_cuda:
        raise _no_kernels(tensor, name)
    return Stream(device.index, torch.cuda.current_stream(device).cuda_stream)


def pack(
    destination: Tensor,
    sources: list[Span],
    offsets: list[int],
    *,
    scale: float,
    accumulate: bool,
    factor: Tensor | None = None,
) -> None:
    """Gathers `sources`, on the device of `destination`, into that flat tensor, source i from element `offsets[i]` on.

    destination = [destination +] source * scale [* factor], in fp32, rounded once. A span at address 0 counts as
    zeros. `factor` is one float64 on the same device, which the host need not know.
    """
    where = _where("destination", destination, factor=factor)
    target, known = span(destination, "destination"), 0 if factor is None else address(_one_double(factor), "factor")
    _core.pack(target, sources, offsets, scale, known, accumulate, where)


def cast(
    destination: Tensor,
    source: Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    threads: int | None = None,
) -> None:
    """destination = [destination +] source * scale, in fp32, rounded once; both of the same number of elements."""
    where = _where("destination", destination, threads, source=source)
    _core.cast(span(destination, "destination"), span(source, "source"), scale, accumulate, where)


def reduce(destination: Tensor, sources: list[Tensor], reduction: Reduction) -> None:
    """The reduction of CPU tensors of one size and dtype, in their order, in fp32, rounded once; `destination` may be
    one of them."""
    for tensor in (destination, *sources):
        if not tensor.is_cpu:
            raise ValueError(
                f"a tensor to reduce is on device '{tensor.device}': only tensors on the CPU are reduced here"
            )
    spans = [span(source, f"source {i}") for i, source in enumerate(sources)]
    _core.reduce(span(destination, "destination"), spans, reduction, torch.get_num_threads())


@dataclass(frozen=True)
class Part(Generic[NativePart]):
    """One of the shards that a kernel works on in one call; memory that must not move."""

    native: NativePart
    device: torch.device


def _native_parts(parts: list[Part[NativePart]], name: str, tensor: Tensor) -> list[NativePart]:
    """What the native core takes of parts that are on the device of `tensor`."""
    for part in parts:
        if part.device != tensor.device:
            raise ValueError(f"{name} is on device '{tensor.device}' but a part is on '{part.device}'")
    return [part.native for part in parts]


def norm_part(values: Tensor, segments: Segments) -> Part[NormPart]:
    """What `sum_of_squares` adds up of a buffer."""
    return Part(NormPart(span(values, "values"), segments), values.device)


def sum_of_squares(total: Tensor, parts: list[Part[NormPart]], *, threads: int | None = None) -> None:
    """Adds the sum of squares of all parts to `total` (float64, one element, on the device of all parts)."""
    where, address_of_total = _where("total", total, threads), address(_one_double(total), "total")
    native = _native_parts(parts, "total", total)
    if isinstance(where, Stream):
        blocks = sum(part.blocks for part in native)
        scratch = torch.empty(blocks, dtype=torch.float64, device=total.device)
        _core.norm(address_of_total, native, address(scratch, "scratch"), where)
    else:
        _core.norm(address_of_total, native, where)


def split_master(
    params: Tensor, master: Tensor, remainder: Tensor | None = None, *, threads: int | None = None
) -> None:
    """Writes 16-bit `params` from their fp32 `master`, and the 16 bits (int16) that bf16 ones lack to be exact.

    bf16 is rounded to nearest, ties away from zero: see [Note: split masters] in weights.h.
    """
    where = _where("params", params, threads, master=master, remainder=remainder)
    _core.split_master(span(params, "params"), _remainder(remainder, master), span(master, "master"), where)


def join_master(master: Tensor, params: Tensor, remainder: Tensor) -> None:
    """The reverse of `split_master`, bit for bit."""
    where = _where("master", master, params=params, remainder=remainder)
    _core.join_master(span(master, "master"), span(params, "params"), _remainder(remainder, master), where)


def adopt_written(master: Tensor, params: Tensor) -> None:
    """Elements of `params` that are not their fp32 master rounded were written by others: the master takes them."""
    rounded = torch.empty_like(params)
    split_master(rounded, master)
    master.copy_(torch.where(rounded == params, master, params.float()))


def is_finite(tensor: Tensor) -> Tensor:
    """Whether every element of a tensor is finite: a bool without dimensions; one pass, any dtype and strides."""
    return torch.isfinite(tensor).all()


def adam_part(
    *,
    grads: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    params: Tensor | None,
    segments: Segments,
    remainder: Tensor | None = None,
) -> Part[AdamPart]:
    """Flat buffers of equal size on one device that `adam` updates.

    `params` None: the master is the parameter. `master` None: it is split into bf16 `params` and `remainder`.
    """
    if master is None and remainder is None:
        raise ValueError("there are neither master weights nor a remainder")
    named = {"grads": grads, "master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "params": params}
    buffers = {name: buffer for name, buffer in named.items() if buffer is not None}
    numel = next(buffer.numel() for buffer in (master, params, exp_avg) if buffer is not None)
    for name, buffer in buffers.items():
        if buffer.numel() != numel:
            raise ValueError(f"{name} has {buffer.numel()} elements, the weights have {numel}")
    (first, buffer), *others = buffers.items()
    _where(first, buffer, None, **dict(others), remainder=remainder)
    spans = {name: span(buffer, name) for name, buffer in buffers.items()}
    native = AdamPart(
        spans["grads"],
        spans.get("master", NOTHING),
        _remainder(remainder, exp_avg),
        spans["exp_avg"],
        spans["exp_avg_sq"],
        spans.get("params", NOTHING),
        segments,
    )
    return Part(native, grads.device)


def move_grads(parts: list[Part[AdamPart]], grads: list[Tensor]) -> None:
    """Has each part read its gradients from another tensor of its device, of the size and dtype that the part was made
    with. The caller has compared dtypes.

    That is much faster than `adam_part`, which looks at all buffers.

    Raises:
        ValueError: another size or device, or as for `address`.
    """
    if {part.device for part in parts} != set(map(_device, grads)):
        raise ValueError("gradients are on other devices than the parts that are to read them")
    _core.move_grads([part.native for part in parts], _addresses(grads, "grads"), list(map(Tensor.numel, grads)))


def adam(parts: list[Part[AdamPart]], groups: list[AdamGroup], control: Tensor, *, threads: int | None = None) -> None:
    """One Adam or AdamW update of all parts (see `adam.h`).

    `control` is a `StepControl` in memory, on the device of all parts: uint8, of its number of bytes.
    """
    if control.dtype != torch.uint8 or control.numel() != _core.StepControl.nbytes:
        raise TypeError(f"control is {_core.StepControl.nbytes} bytes, not {control.numel()} x {control.dtype}")
    where = _where("control", control, threads)
    _core.adam(_native_parts(parts, "control", control), groups, address(control, "control"), where)


def loss_scale_update(
    control: Tensor, state: Tensor, scaler: LossScaler, sum_of_squares: Tensor, *, mean: float, clip: float
) -> None:
    """Decides about a step, in memory (see loss_scale.h): `control` and `state` are the structs' bytes."""
    where = _where("control", control, state=state, sum_of_squares=sum_of_squares)
    total = address(_one_double(sum_of_squares), "sum_of_squares")
    stream = where if isinstance(where, Stream) else None
    _core.loss_scale_update(address(control), address(state), scaler, total, mean, clip, stream)


def _one_double(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float64 or tensor.numel() != 1:
        raise TypeError(f"one float64 is needed, not {tensor.numel()} x {tensor.dtype}")
    return tensor


def _remainder(remainder: Tensor | None, like: Tensor) -> int:
    if remainder is None:
        return 0
    if remainder.dtype != torch.int16 or remainder.numel() != like.numel():
        raise TypeError(f"the remainder is {like.numel()} int16, not {remainder.numel()} x {remainder.dtype}")
    return address(remainder, "remainder")
