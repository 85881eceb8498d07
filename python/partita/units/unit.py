"""A unit's memory: the flat buffers that a layout describes, with the model's parameters as views into them."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from partita import kernels
from partita._core import Segments
from partita.comm import Communicator
from partita.memory import flat_buffer
from partita.units.layout import ParameterInfo, UnitLayout, make_layout, plan_buckets
from partita.units.policy import StagePolicy


class GradState(Enum):
    """What a unit's gradient buffers hold."""

    EMPTY = "nothing since the last step"
    LOCAL = "this rank's micro-batches, not reduced yet"
    REDUCED = "the sum over ranks"


class Unit:
    """Parameters that communicate together.

    `own` is the range of the full buffer whose optimizer states this rank keeps: everything in stage 0, its shard
    above.
    """

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        communicator: Communicator,
        policy: StagePolicy,
        splits_masters: bool,
    ) -> None:
        shard = layout.shard_range(communicator.rank)
        self.layout = layout
        self.parameters = parameters
        self.dtype = dtype
        self.own = shard if policy.shards_states else range(layout.numel)
        self.segments = _segments(layout, self.own, self.own.start)
        # Every element is counted by one rank in every stage, so that the norm has the same bits in all of them.
        self.norm_segments = _segments(layout, shard, self.own.start)

        weights = _full_precision_weights(layout, parameters, communicator)
        # fp32; for fp32 parameters, this rank's part of them. None: `remainder` (int16) has what the parameters lack.
        self.master: Tensor | None = None
        self.remainder: Tensor | None = None
        if dtype == torch.float32:
            self.params = weights
            self.master = self.part(weights)
        else:
            self.params = communicator.empty(layout.numel, dtype)
            kernels.split_master(self.params, weights)
            if splits_masters:
                self.remainder = flat_buffer(len(self.own), torch.int16, communicator.device)
                kernels.split_master(self.part(self.params), self.part(weights), self.remainder)
            else:
                self.master = flat_buffer(len(self.own), torch.float32, communicator.device).copy_(self.part(weights))
        self.addresses = self._point_parameters_here()
        self._versions = [parameter._version for parameter in parameters]  # the engine's own writes do not count

        # Accumulation dtype. `reduced`: the gradients of `own`, a view of `full_grads` where that exists.
        self.full_grads = communicator.empty(layout.numel, grad_dtype) if policy.keeps_full_grads else None
        self.reduced = (
            communicator.empty(len(self.own), grad_dtype) if self.full_grads is None else self.part(self.full_grads)
        )
        self.grad_state = GradState.EMPTY

    def part(self, full: Tensor) -> Tensor:
        """This rank's own range of a full buffer, as a view."""
        return full[self.own.start : self.own.stop]

    def full_precision(self) -> Tensor:
        """The fp32 weights of this rank's own range: the masters themselves, or a copy where they are split."""
        if self.master is not None:
            return self.master
        joined = torch.empty(len(self.own), dtype=torch.float32, device=self.params.device)
        if self.remainder is not None:
            kernels.join_master(joined, self.part(self.params), self.remainder)
        return joined

    def offsets(self) -> list[int]:
        """Where each parameter starts in the full buffer."""
        return [slot.offset for slot in self.layout.slots]

    def _point_parameters_here(self) -> list[int]:
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            parameter.data = self.params[slot.offset : slot.offset + slot.numel].view(slot.shape)
            parameter.grad = None
        return [parameter.data_ptr() for parameter in self.parameters]

    def check_parameters_in_place(self) -> None:
        """Raises RuntimeError when a parameter's memory was replaced, so that updates would no longer reach it."""
        if list(map(Tensor.data_ptr, self.parameters)) == self.addresses:
            return
        moved = next(
            slot.name
            for slot, p, address in zip(self.layout.slots, self.parameters, self.addresses, strict=True)
            if p.data_ptr() != address
        )
        raise RuntimeError(
            f"the memory of parameter '{moved}' was replaced after initialize() (by .to(), .half(), .data = ... or the "
            "like), so training no longer reaches it: convert the model before initialize(), and write into a "
            "parameter with copy_() under torch.no_grad()"
        )

    def adopt_written_parameters(self) -> None:
        """Brings into the masters what others wrote into 16-bit parameters since the last step: loaded weights, say.

        An element that still is its master rounded keeps the master's precision; where masters are split, those of a
        written parameter become its 16-bit values, as which elements were written is not known. Writes are seen by
        autograd's version counters, so those through `.data` go unnoticed.
        """
        versions = [parameter._version for parameter in self.parameters]
        if versions == self._versions:
            return
        written = {slot for slot, a, b in zip(self.layout.slots, versions, self._versions, strict=True) if a != b}
        self._versions = versions
        if self.remainder is not None:
            for part in self.layout.slices(self.own):
                if part.slot in written:
                    self.remainder[part.shard_offset : part.shard_offset + part.numel].zero_()
        elif self.master is not None and self.dtype != torch.float32:
            kernels.adopt_written(self.master, self.part(self.params))


def build_units(
    named: list[tuple[str, nn.Parameter, int]],
    *,
    communicator: Communicator,
    policy: StagePolicy,
    bucket_numel: int,
    compute_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
    splits_masters: bool = False,
) -> list[Unit]:
    """Communication buckets of (name, parameter, optimizer group), in launch order.

    Parameters become views of flat buffers of `compute_dtype` (None: each keeps its dtype), with rank 0's values on
    every rank. Gradients accumulate in `grad_dtype` (None: the parameters' dtype). `splits_masters`: the masters of
    bf16 parameters are kept as 16 bits beside them. Memory is bounded by one unit at a time.

    Raises:
        TypeError, ValueError: a parameter's dtype or device cannot be trained; names it.
    """
    device = communicator.device
    infos = [_info(name, parameter, group, compute_dtype, device) for name, parameter, group in named]
    units = []
    for bucket in plan_buckets(infos, bucket_numel):
        parameters = [named[i][1] for i in bucket]
        dtype = compute_dtype or parameters[0].dtype
        layout = make_layout([infos[i] for i in bucket], communicator.world_size)
        units.append(Unit(layout, parameters, dtype, grad_dtype or dtype, communicator, policy, splits_masters))
    return units


def require_on(device: torch.device, what: str, tensor: Tensor) -> None:
    """Raises ValueError, naming `what`, for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(
            f"{what} is on device '{tensor.device}', the model on '{device}': "
            + ("give it values with to_empty() first" if tensor.is_meta else "move the whole model to one device first")
        )


def _info(
    name: str, parameter: nn.Parameter, group: int, compute_dtype: torch.dtype | None, device: torch.device
) -> ParameterInfo:
    if parameter.dtype not in kernels.DTYPES:
        raise TypeError(
            f"parameter '{name}' is {parameter.dtype}: Partita trains float32, float16 and bfloat16; convert the model "
            "before initialize(), or freeze the parameter"
        )
    require_on(device, f"parameter '{name}'", parameter)
    dtype = compute_dtype or parameter.dtype
    return ParameterInfo(name, tuple(parameter.shape), group, dtype.itemsize, str(dtype))


def _full_precision_weights(layout: UnitLayout, parameters: list[nn.Parameter], communicator: Communicator) -> Tensor:
    """The user's weights in fp32, before they are cast, as rank 0 has them."""
    weights = communicator.empty(layout.numel, torch.float32)
    contiguous = [p.detach().contiguous() for p in parameters]
    offsets = [slot.offset for slot in layout.slots]
    kernels.pack(weights, [kernels.span(p) for p in contiguous], offsets, scale=1.0, accumulate=False)
    communicator.broadcast(weights, 0).wait()
    return weights


def _segments(layout: UnitLayout, elements: range, origin: int) -> Segments:
    shift = elements.start - origin
    return Segments([(s.shard_offset + shift, s.numel, s.slot.group) for s in layout.slices(elements)])
