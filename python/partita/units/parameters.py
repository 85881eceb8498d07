"""Parameters in one flat buffer, and how long the full buffer exists."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from partita.comm import CommunicationError, Communicator, Done, Handle
from partita.device.memory import FreedMemory, flat_buffer, host_buffer
from partita.units.absent import give_to, holder_of, make_absent, make_present
from partita.units.layout import Slot, UnitLayout


class Lifetime(Enum):
    """Where full parameters are, and when."""

    ALWAYS = "on every rank, all the time"
    MAPPED = "once per host: every rank has all shards in its address space, and uses them while it computes"
    GATHERED = "on every rank while their module computes, gathered from the shards"


class Residency(Enum):
    """Whether the full parameters of a unit can be used."""

    ABSENT = "each rank has its shard"
    COMING = "they are being gathered"
    HERE = "they are here"


@dataclass(frozen=True)
class Offload:
    """What is kept on the host while the model computes on its device. On the CPU that is the same memory; the copies
    are made all the same.

    states: the share of the elements whose masters, moments and reduced gradients are on the host. params: the shards
    of GATHERED parameters, too. pin: in pinned memory.
    """

    states: float = 0.0
    params: bool = False
    pin: bool = True


RESIDENT = Offload()


class FlatParameters:
    """Parameters that come and go together.

    `params` is the full buffer, of which this rank owns the range `own`: `own_params`, whose memory lasts. In stages 0
    to 2, the parameters are views of `params` for good.

    A GATHERED buffer is a torch storage whose memory is released by resizing it to zero, and filled again in place, so
    views of it and tensors saved for backward are valid again when it is here again. A MAPPED buffer lasts; the
    parameters point to it while they compute, and otherwise to a storage without memory.

    `hold` gives the parameters memory that this rank shares with nobody, so that writing there reaches no other rank
    until `keep` says what becomes of it.
    """

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        communicator: Communicator,
        own: range,
        lifetime: Lifetime,
        gathering: Communicator | None = None,
        offload: Offload = RESIDENT,
    ) -> None:
        self.layout = layout
        self.parameters = parameters
        self.dtype = dtype
        self.own = own
        self.lifetime = lifetime
        self.residency = Residency.HERE
        self.communicator = communicator
        self._gathering = gathering or communicator  # carries what `send_for` brings
        self._handle: Handle = Done()
        self._computes = False  # somebody has sent for the parameters to compute with them
        self._holds = 0
        device = communicator.device
        if lifetime is Lifetime.GATHERED:
            self.params = torch.empty(layout.numel, dtype=dtype, device=device)
            self.own_params = (
                host_buffer(len(own), dtype, offload.pin) if offload.params else flat_buffer(len(own), dtype, device)
            )
        else:
            mapped = communicator.mapped(layout.numel, dtype) if lifetime is Lifetime.MAPPED else None
            self.params = communicator.empty(layout.numel, dtype) if mapped is None else mapped
            self.own_params = self.part(self.params)
        # Where the parameters are when they do not compute.
        self._home = torch.empty_like(self.params) if lifetime is Lifetime.MAPPED else self.params
        self._views = {id(buffer): self._views_of(buffer) for buffer in (self.params, self._home)}
        self._places: list[int] = []
        self._versions: list[int] = []  # of the parameters, when their values were last known
        self._versions_at_hold: list[int] = []
        self._written: set[Slot] = set()  # that `keep` was given since somebody looked

    @property
    def gathered_bytes(self) -> int:
        """Memory that this rank spends on full parameters which it does not keep."""
        return 0 if self.lifetime is Lifetime.ALWAYS else self._home.untyped_storage().nbytes()

    @property
    def is_held(self) -> bool:
        """Whether the parameters are here for somebody who holds them."""
        return self._holds > 0

    def part(self, full: Tensor) -> Tensor:
        """This rank's own range of a full buffer, as a view."""
        return full[self.own.start : self.own.stop]

    def offsets(self) -> list[int]:
        """Where each parameter starts in the full buffer."""
        return [slot.offset for slot in self.layout.slots]

    def name_of(self, parameter: nn.Parameter) -> str:
        """The parameter's name in the model."""
        return next(s.name for s, p in zip(self.layout.slots, self.parameters, strict=True) if p is parameter)

    def take_parameters(self) -> None:
        """The parameters become views of this memory, whose own part has their values."""
        make_present(self.parameters)
        self._point(self._home)
        for parameter in self.parameters:
            parameter.grad = None
        self._places = self._where()
        self._versions = [parameter._version for parameter in self.parameters]  # the engine's own writes do not count
        give_to(weakref.ref(self), self.parameters)  # a model may outlive its engine
        if self.lifetime is not Lifetime.ALWAYS:
            self._leave()

    # -- while they compute

    def send_for(self) -> None:
        """Starts to bring the parameters here; all ranks do so for the same units in the same order."""
        self._computes = True
        if self.residency is not Residency.ABSENT:
            return
        if self.lifetime is Lifetime.MAPPED:
            make_present(self.parameters)
            self._point(self.params)
        else:
            self._fill_home()
        self.residency = Residency.COMING

    def arrive(self) -> None:
        """Returns when the parameters can be used."""
        if self.residency is Residency.COMING:
            self._handle.wait()
            self._handle = Done()
            make_present(self.parameters)
            self.residency = Residency.HERE

    def release(self) -> None:
        """Nothing computes with the parameters any more."""
        self._computes = False
        if self.lifetime is Lifetime.ALWAYS or self._holds or self.residency is Residency.ABSENT:
            return
        try:
            self.arrive()
        except CommunicationError:  # nobody needs the values; the buffer stays, as the transport may still write there
            return
        if self.lifetime is Lifetime.MAPPED:
            self._point(self._home)
        self._leave()

    # -- for others than the model's forward and backward, see `Holder`

    @contextmanager
    def whole(self) -> Iterator[Callable[[nn.Parameter], Tensor]]:
        """Values to be read only, see `Holder`."""
        if self.lifetime is Lifetime.MAPPED:  # read where they are
            views = dict(zip(map(id, self.parameters), self._views[id(self.params)], strict=True))
            yield lambda parameter: views[id(parameter)]
            return
        self.hold()
        try:
            yield lambda parameter: parameter.detach()
        finally:
            self.let_go()

    def hold(self) -> None:
        """The values are here in memory of this rank's own, see `Holder`."""
        if self._holds or self.lifetime is Lifetime.ALWAYS:
            self._holds += 1
            return
        self._versions_at_hold = [parameter._version for parameter in self.parameters]
        if self.lifetime is Lifetime.MAPPED:
            self._fill_home()
            make_present(self.parameters)
            self._point(self._home)
            self.residency = Residency.HERE
        elif self.residency is Residency.ABSENT:
            self._fill_home()
            self.residency = Residency.COMING
        self.arrive()
        self._holds = 1

    def let_go(self) -> None:
        """The reverse of `hold`."""
        self._holds -= 1
        if self._holds or self.lifetime is Lifetime.ALWAYS:
            return
        # What was written in between is kept by now, or forgotten; what was written before is still unclaimed.
        since = zip(self._versions, self.parameters, self._versions_at_hold, strict=True)
        self._versions = [known + parameter._version - then for known, parameter, then in since]
        if self._where() != self._places:  # somebody assigned .data
            self._point(self._home)
        if not self._computes:  # else backward may need what forward has saved of these
            self._leave()

    def keep(self, parameters: list[nn.Parameter]) -> None:
        """What was written becomes the values, see `Holder`."""
        kept = set(map(id, parameters))
        given = {s: p for s, p in zip(self.layout.slots, self.parameters, strict=True) if id(p) in kept}
        for part in self.layout.slices(self.own) if self.lifetime is not Lifetime.ALWAYS else []:
            if part.slot in given:
                values = given[part.slot].detach().reshape(-1)
                own = self.own_params[part.in_shard]
                own.copy_(values[part.in_parameter])
        self._written |= given.keys()
        if self.lifetime is Lifetime.MAPPED:
            self.communicator.barrier()  # the others may read

    # -- noticing

    def check_parameters_in_place(self) -> None:
        """Raises RuntimeError when a parameter's memory was replaced, so that updates would no longer reach it."""
        places = self._where()
        if places == self._places:
            return
        slots = zip(self.layout.slots, places, self._places, strict=True)
        moved = next(slot.name for slot, now, then in slots if now != then)
        raise RuntimeError(
            f"the memory of parameter '{moved}' was replaced after initialize() (by .to(), .half(), .data = ... or the "
            "like), so training no longer reaches it: convert the model before initialize(), and write into a "
            "parameter with copy_() under torch.no_grad()"
        )

    def check_unwritten(self) -> None:
        """Raises RuntimeError when a parameter that comes and goes was written to, as other ranks do not know."""
        if self.lifetime is Lifetime.ALWAYS:
            return
        slots = zip(self.layout.slots, self.parameters, self._versions, strict=True)
        written = next((slot.name for slot, p, known in slots if p._version != known), None)
        if written is not None:
            raise RuntimeError(
                f"parameter '{written}' was written to while it was gathered (ZeRO stage 3), which reaches its "
                "shards on no rank or on some: write inside `with partita.zero.GatheredParameters(parameters, "
                "modifier_rank=0)`; a module that changes its own parameters in forward needs stage 0, 1 or 2"
            )

    def _where(self) -> list[int]:
        """What tells that a parameter still lies here: its address, or its storage where addresses come and go."""
        if self.lifetime is Lifetime.ALWAYS:
            return list(map(Tensor.data_ptr, self.parameters))
        return [p.untyped_storage()._cdata for p in self.parameters]

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[slot.in_unit].view(slot.shape) for slot in self.layout.slots]

    def _point(self, buffer: Tensor) -> None:
        for parameter, view in zip(self.parameters, self._views[id(buffer)], strict=True):
            parameter.data = view

    def _fill_home(self) -> None:
        self._home.untyped_storage().resize_(self._home.numel() * self._home.itemsize)
        if self.lifetime is Lifetime.MAPPED:
            self._home.copy_(self.params)
        else:
            self._handle = self._gather_home()

    def _gather_home(self) -> Handle:
        if self.own_params.device == self._home.device:
            return self._gathering.all_gather_into(self._home, self.own_params)
        self.part(self._home).copy_(self.own_params, non_blocking=True)
        return self._gathering.all_gather(self._home)

    def _leave(self) -> None:
        self._free_home()
        make_absent(self.parameters)
        self.residency = Residency.ABSENT

    def _free_home(self) -> None:
        if not self._home.untyped_storage().resizable():  # somebody called numpy(), and may still have the array
            home = torch.empty_like(self._home)
            if self.params is self._home:
                self.params = home
            self._home = home
            self._views = {id(buffer): self._views_of(buffer) for buffer in (self.params, self._home)}
            self._point(home)
            self._places = self._where()
        self._home.untyped_storage().resize_(0)


def full_values(parameter: nn.Parameter) -> Tensor:
    """A copy of all values of a parameter: also of one that is partitioned, when all ranks ask together."""
    holder = holder_of(parameter)
    if holder is None:
        return parameter.detach().clone(memory_format=torch.contiguous_format)
    with holder.whole() as values_of:
        return values_of(parameter).clone(memory_format=torch.contiguous_format)


def fill_from_rank_0(
    destination: Tensor,
    layout: UnitLayout,
    elements: range,
    parameters: list[nn.Parameter],
    communicator: Communicator,
) -> None:
    """Copies the values that parameters have on rank 0, as far as they lie in a range of a layout; one at a time."""
    parts = {part.slot: part for part in layout.slices(elements)}
    freed = FreedMemory()
    for slot, parameter in zip(layout.slots, parameters, strict=True):
        values = full_values(parameter)
        communicator.broadcast(values, 0).wait()
        if (part := parts.get(slot)) is not None:
            taken = values.view(-1)[part.in_parameter]
            destination[part.in_shard] = taken
        freed.add(values.nbytes)
