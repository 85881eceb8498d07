"""What is trained: parameters with this rank's part of their masters, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

import torch
from torch import Tensor

from partita._core import Segments
from partita.device import kernels
from partita.device.memory import flat_buffer, host_buffer
from partita.device.streams import HostCopy, Streams
from partita.units.layout import Slot, UnitLayout
from partita.units.parameters import FlatParameters, fill_from_rank_0
from partita.units.policy import RESIDENT, Offload, StagePolicy
from partita.units.residence import Residence

_requires_grad = attrgetter("requires_grad")
BLOCK = 2**19  # elements


class GradState(Enum):
    """What a unit's gradient buffers hold."""

    EMPTY = "nothing since the last step"
    LOCAL = "this rank's micro-batches, not reduced yet"
    REDUCED = "the sum over ranks"


@dataclass(frozen=True)
class UnitForm:
    """In which formats the states of a unit are kept, and where. splits_masters: the masters of bf16 parameters are 16
    bits beside them."""

    grad_dtype: torch.dtype
    splits_masters: bool = False
    offload: Offload = RESIDENT


class Unit(FlatParameters):
    """Parameters that are trained, and communicate together.

    `own` is the range of the full buffer whose optimizer states this rank keeps: everything in stage 0, its shard
    above.
    """

    def __init__(self, residence: Residence, form: UnitForm, policy: StagePolicy, streams: Streams) -> None:
        super().__init__(residence)
        self._streams = streams
        self._published: HostCopy | None = None  # what reads `updated`, if that is on the host
        layout, communicator = self.layout, self.communicator
        self.segments = _segments(layout, self.own, self.own.start)
        # Every element is counted by one rank in every stage, so that the norm has the same bits in all of them.
        self.norm_segments = _segments(layout, layout.shard_range(communicator.rank), self.own.start)
        self.offloads = form.offload.states > 0  # what follows is on the host, and moves there and back
        self.pins = form.offload.pin  # in memory that the device copies from and to by itself

        # fp32; for fp32 parameters, this rank's part of them. None: `remainder` (int16) has what `updated` lacks.
        self.master: Tensor | None = None
        self.remainder: Tensor | None = None
        # What an update writes: `own_params`, or what becomes it when it is brought back from the host.
        self.updated = self.own_params
        self._take_weights(form.splits_masters)
        self.take_parameters()
        # What the optimizer keeps for every element of `own`, by name: exp_avg, say. `kept` has this rank's piece of it
        # by the optimizer's name and the parameter's slot, for the parameters that have it.
        self.states: dict[str, Tensor] = {}
        self.kept: dict[str, dict[Slot, Tensor]] = {}

        # Accumulation dtype. `reduced`: the gradients of `own`, a view of `full_grads` where that exists.
        self.full_grads = communicator.empty(layout.numel, form.grad_dtype) if policy.keeps_full_grads else None
        if self.full_grads is not None and not self.offloads:
            self.reduced = self.part(self.full_grads)
        else:
            self.reduced = self.state_buffer(form.grad_dtype)
        self.grad_state = GradState.EMPTY
        self._adopts_always = False  # as a program writes where nothing counts

    def leave_out_of_norm(self, names: Collection[str]) -> None:
        """The gradients of these parameters are counted elsewhere: another unit has the same parameters."""
        own = self.layout.shard_range(self.communicator.rank)
        self.norm_segments = _segments(self.layout, own, self.own.start, names)

    def frozen_slots(self) -> frozenset[Slot]:
        """The parameters that the program has frozen since: they do not require gradients now."""
        with torch._C.DisableTorchFunctionSubclass():
            if all(map(_requires_grad, self.parameters)):  # almost always
                return frozenset()
            slots = zip(self.layout.slots, self.parameters, strict=True)
            return frozenset(slot for slot, parameter in slots if not parameter.requires_grad)

    def drop_gradient(self, slot: Slot) -> None:
        """What there is of the gradient of a parameter becomes zeros."""
        if self.grad_state is GradState.LOCAL and self.full_grads is not None:
            self.full_grads[slot.in_unit].zero_()
        elif self.grad_state is GradState.REDUCED:
            for part in self.own_slices():
                if part.slot == slot:
                    self.reduced[part.in_shard].zero_()

    def state_buffer(self, dtype: torch.dtype) -> Tensor:
        """Memory for something of every element of `own`, where the optimizer computes; zeros."""
        if self.offloads:
            return host_buffer(len(self.own), dtype, self.pins)
        return flat_buffer(len(self.own), dtype, self.params.device)

    def _take_weights(self, splits_masters: bool) -> None:
        """The user's weights, before they are cast, as rank 0 has them; kept in fp32 where that is a master."""
        is_fp32 = self.dtype == torch.float32
        whole = not self.residence.comes_and_goes  # then the full buffer is filled, else this rank's own range
        elements = range(self.layout.numel) if whole else self.own
        if is_fp32:
            weights = self.params if whole else self.own_params
        else:
            weights = flat_buffer(len(elements), torch.float32, self.params.device)
        fill_from_rank_0(weights, self.layout, elements, self.parameters, self.communicator)
        if whole and not is_fp32:
            kernels.split_master(self.params, weights)
        weights = self.part(weights) if whole else weights
        if self.offloads and self.own_params.device == self.params.device:
            self.updated = self.state_buffer(self.dtype)
        if is_fp32:
            self.master = self.updated
            if self.updated is not self.own_params:
                self.updated.copy_(weights)
            return
        if self.offloads:
            weights = self.state_buffer(torch.float32).copy_(weights)
        if splits_masters:
            self.remainder = self.state_buffer(torch.int16)
        else:
            self.master = self.state_buffer(torch.float32).copy_(weights) if whole and not self.offloads else weights
        kernels.split_master(self.updated, weights, self.remainder)
        self.publish()

    def publish(self) -> None:
        """The parameters of `own` are what the last update wrote; on a GPU, for what is queued from now on."""
        if self.updated is not self.own_params:
            self._published = self._streams.bring(self.own_params, self.updated)
            self._published.come_after()

    def settle(self) -> None:
        super().settle()
        if self._published is not None:
            self._published.wait()
            self._published = None

    def stored_weights(self) -> dict[str, Tensor]:
        """How the weights of this rank's own range are kept, nothing converted: "" what the model computes with, and
        where that is 16 bits "weight", the fp32 masters, or "remainder", the int16 that a split master has beside it.
        """
        if self.dtype == torch.float32 and self.master is not None:
            return {"": self.master}
        beside = {"weight": self.master, "remainder": self.remainder}
        return {"": self.updated, **{name: flat for name, flat in beside.items() if flat is not None}}

    def full_precision(self) -> Tensor:
        """The fp32 weights of this rank's own range: the masters themselves, or a copy where they are split."""
        if self.master is not None:
            return self.master
        joined = torch.empty(len(self.own), dtype=torch.float32, device=self.updated.device)
        if self.remainder is not None:
            kernels.join_master(joined, self.updated, self.remainder)
        return joined

    def write_full_precision(self, values: Tensor) -> None:
        """The fp32 weights of this rank's own range become `values`, and the parameters with them. A collective."""
        with self.rewriting():
            self.take_full_precision(slice(0, len(self.own)), values)

    def take_full_precision(self, part: slice, values: Tensor) -> None:
        """Weights of this rank's own range, of any dtype and device, while it is `rewriting`. Where there are masters,
        these may be written in memory instead, and where they are split, parameters and remainders (`stored_weights`).
        """
        values = values.to(self.updated.device)
        if self.remainder is not None:
            kernels.split_master(self.updated[part], values.float(), self.remainder[part])
        elif self.master is not None:
            self.master[part].copy_(values)

    def _follow(self) -> None:
        if self.master is not None and self.dtype != torch.float32:
            kernels.split_master(self.updated, self.master)
        self.publish()
        if self.residence.all_gathers_updates and len(self.own) < self.layout.numel:
            self.communicator.all_gather(self.params).wait()

    def adopt_written_parameters(self, *, looks: bool = False) -> str | None:
        """Brings into the masters what others wrote into 16-bit parameters since the last step: loaded weights, say.

        An element that still is its master rounded keeps the master's precision; where masters are split, those of a
        written parameter become its 16-bit values, as which elements were written is not known. Writes are seen by
        autograd's version counters, so those through `.data` are not; those inside GatheredParameters by `commit`.

        Args:
            looks: also for writes that nothing counted. The host waits. Once there was one, every call adopts them.

        Returns:
            The parameter of the first write that nothing counted; None while there is none, and later.
        """
        written = self.take_written()
        unseen = self._uncounted_write() if looks and not written and not self._adopts_always else None
        self._adopts_always = self._adopts_always or unseen is not None
        if written or self._adopts_always:
            self._adopt(written)
        return unseen

    def adopt_unseen(self) -> Tensor | None:
        """The same with `looks`, on a device for which the host does not wait.

        Returns:
            For `has_unseen()`, an int64 without dimensions on the device; None where there is nothing to look for.
        """
        place: Tensor | None = None
        written = self.take_written()
        looks = not written and not self._adopts_always and self._shows_writes
        if looks:
            differs = _differ(self._made_by_update(slice(None)), self.own_params)
            place = torch.where(differs.any(), differs.to(torch.uint8).argmax(), -1)
        if written or self._adopts_always or looks:
            self._adopt(written)
        return place

    def has_unseen(self, place: int) -> str | None:
        """What `adopt_unseen()` has found, read: as `adopt_written_parameters` returns it."""
        found = (s.slot.name for s in self.own_slices() if s.in_shard.start <= place < s.in_shard.stop)
        name = next(found, None)
        self._adopts_always = self._adopts_always or name is not None
        return name

    @property
    def _shows_writes(self) -> bool:
        """Whether a parameter of this rank's own range that others wrote to is not what the last update wrote.
        Parameters that come and go forget what is written to them, and split masters follow their parameters anyway.
        """
        if self.residence.comes_and_goes:
            return False
        return self.updated is not self.own_params or (self.master is not None and self.dtype != torch.float32)

    def _uncounted_write(self) -> str | None:
        """A parameter of this rank's own range that is not what the last update wrote. The host waits."""
        if not self._shows_writes:
            return None
        # In blocks that a processor's caches hold; a GPU takes all at once.
        size = BLOCK if self.own_params.device.type == "cpu" else max(1, len(self.own))
        blocks = [slice(begin, begin + size) for begin in range(0, len(self.own), size)]
        if all(_same_bits(self._made_by_update(b), self.own_params[b]) for b in blocks):
            return None
        differs = _differ(self._made_by_update(slice(None)), self.own_params)
        return next((s.slot.name for s in self.own_slices() if bool(differs[s.in_shard].any())), None)

    def _made_by_update(self, block: slice) -> Tensor:
        """What the last update has made of parameters of this rank's own range."""
        if self.updated is not self.own_params:
            return self.updated[block].to(self.own_params.device)
        assert self.master is not None
        known = torch.empty_like(self.own_params[block])
        kernels.split_master(known, self.master[block])
        return known

    def _adopt(self, slots: Collection[Slot]) -> None:
        self.will_write()
        if self.updated is not self.own_params:
            self.updated.copy_(self.own_params)
        if self.remainder is not None:
            for part in self.own_slices():
                if part.slot in slots:
                    self.remainder[part.in_shard].zero_()
        elif self.master is not None and self.dtype != torch.float32:
            kernels.adopt_written(self.master, self.updated)


def _differ(known: Tensor, here: Tensor) -> Tensor:
    """For each element; NaN is like NaN."""
    return (known != here) & ~(known.isnan() & here.isnan())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    wide = a.nbytes % 8 == 0 and (b.storage_offset() * b.element_size()) % 8 == 0
    bits = torch.int64 if wide else torch.uint8
    return torch.equal(a.view(bits), b.view(bits))


def _segments(layout: UnitLayout, elements: range, origin: int, without: Collection[str] = ()) -> Segments:
    shift = elements.start - origin
    slices = (s for s in layout.slices(elements) if s.slot.name not in without)
    return Segments([(s.shard_offset + shift, s.numel, s.slot.group) for s in slices])
