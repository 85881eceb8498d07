"""What parameters that come and go have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from partita.comm import CommunicationError, Communicator
from partita.units.absent import make_absent, make_gone, make_present
from partita.units.layout import UnitLayout
from partita.units.residence.base import Residence, Residency


class Transient(Residence):
    """Parameters that have memory only while something uses them.

    [Note: home]
    The home is a full buffer that belongs to this rank alone. While the parameters are absent they are views of the
    home, and the home's storage is resized to zero bytes: the tensor objects stay, the memory goes. Resizing the same
    storage back gives all views memory again: the parameters, and what autograd saved of them in a forward. A new
    buffer could not do that, as saved tensors keep the storage of the old one.
    """

    comes_and_goes = True

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        own: range,
        communicator: Communicator,
        home: Tensor,
    ) -> None:
        super().__init__(layout, parameters, dtype, own, communicator)
        self._home = home
        self._home_views = self._views_of(home)
        self._home_storage: int = home.untyped_storage()._cdata
        self._computes = False  # a module has called start_gather() and not yet release()
        self._gives_away = False  # the home's memory, when it would go

    @property
    def home_storage(self) -> int:
        return self._home_storage

    @property
    def gathered_bytes(self) -> int:
        return self._home.untyped_storage().nbytes()

    def take(self) -> None:
        make_present(self.parameters)  # zero.Init() may have made them absent, and then .data cannot be set
        self._point_to(self._home_views)
        self._places = self._current_places()
        self._leave()

    def abandon(self, parameters: list[nn.Parameter]) -> None:
        self.release()
        if self.state is not Residency.ABSENT:  # somebody has pinned them, and keeps the values with the parameters
            return
        abandoned = set(map(id, parameters))
        for slot, parameter in zip(self.layout.slots, self.parameters, strict=True):
            if id(parameter) in abandoned:
                make_gone(parameter, slot.name)

    # -- for a module that computes

    def start_gather(self) -> None:
        self._computes = True
        if self.state is Residency.ABSENT:
            self._start()
            self.state = Residency.COMING

    def wait(self) -> None:
        self._require("wait", Residency.COMING, Residency.HERE, Residency.PINNED)
        if self.state is Residency.COMING:
            self._finish()
            make_present(self.parameters)
            self.state = Residency.HERE
        else:
            self.join()

    def release(self, *, gives_away: bool = False) -> None:
        self._computes = False
        if self.state is Residency.ABSENT:
            return
        self._gives_away |= gives_away
        if self.state is Residency.PINNED:  # pinned ones leave with the last unpin()
            return
        try:
            self.wait()  # a gather under way writes into the memory that is about to go
        except CommunicationError:
            # Whoever needs the values has the error from its own wait(), so here it is not raised again. The memory
            # stays: the transport may still write into it.
            return
        self._leave()

    # -- for others

    def pin(self) -> None:
        if self.state is not Residency.PINNED:
            self._bring_home()
            self.state = Residency.PINNED
        self._pins += 1

    def unpin(self) -> None:
        self._require("unpin", Residency.PINNED)
        self._pins -= 1
        if self._pins:
            return
        self.state = Residency.HERE
        if any(True for _ in self.moved()):
            self._point_to(self._home_views)  # as what is not committed is forgotten, so is an assigned .data
        # A forward may have run on the pinned values, and backward needs what it saved of them: then the memory stays
        # until the module releases the parameters.
        if not self._computes:
            self._leave()

    def commit(self, parameters: list[nn.Parameter]) -> None:
        self._require("commit", Residency.PINNED)
        self.settle()
        committed = set(map(id, parameters))
        given = {s: p for s, p in zip(self.layout.slots, self.parameters, strict=True) if id(p) in committed}
        for part in self.own_slices():
            if part.slot in given:
                values = given[part.slot].detach().reshape(-1)
                self.own_params[part.in_shard].copy_(values[part.in_parameter])
        if self.is_read_by_peers:
            self.communicator.barrier()  # from here on the others may read what this rank wrote

    # -- what a subclass says

    @abstractmethod
    def _start(self) -> None:
        """ABSENT to COMING."""

    @abstractmethod
    def _finish(self) -> None:
        """COMING to HERE, but for the class of the parameters."""

    @abstractmethod
    def _bring_home(self) -> None:
        """Any state but PINNED to values in the home, and parameters that are views of the home."""

    # -- memory

    def _leave(self) -> None:
        """The parameters, which are views of the home, lose their memory, and their use raises from now on."""
        self._free_home()
        make_absent(self.parameters)
        self.state = Residency.ABSENT

    def _allocate_home(self) -> None:
        self._home.untyped_storage().resize_(self._home.numel() * self._home.itemsize)

    def _free_home(self) -> None:
        storage = self._home.untyped_storage()
        if (self._gives_away and storage.nbytes()) or not storage.resizable():
            # Somebody uses the memory without our knowing: a graph for a backward of higher order, or an array, as
            # numpy() ties the storage of a parameter to its size for good. So the old storage goes to whoever has it,
            # and the unit continues with a new one.
            self._home = torch.empty_like(self._home)
            self._home_storage = self._home.untyped_storage()._cdata
            self._home_views = self._views_of(self._home)
            self._point_to(self._home_views)
            self._places = self._current_places()
        self._gives_away = False
        self._home.untyped_storage().resize_(0)

    def _current_places(self) -> list[int]:
        """The storages, as addresses change with every gather."""
        return [parameter.untyped_storage()._cdata for parameter in self.parameters]
