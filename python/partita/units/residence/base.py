"""What all residences have in common: the calls, the states, and which call is legal in which state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.units.layout import ShardSlice, Slot, UnitLayout


class Residency(Enum):
    """Whether the full parameters of a unit can be used."""

    ABSENT = "each rank has its shard only"
    COMING = "the parameters are on their way"
    HERE = "the parameters can be used"
    PINNED = "the parameters are in memory that belongs to this rank alone, and may be written"


class Residence(ABC):
    """The memory of a unit's parameters.

    `params` is the full buffer. This rank owns the range `own` of it, whose values are in `own_params`: memory that
    lasts as long as the unit.

    A module that computes calls `start_gather`, `wait` and, when nothing computes with the parameters any more,
    `release`. Whoever reads or writes parameters outside of a module's forward calls `pin`, perhaps `commit`, and
    `unpin`. Both may overlap: a unit can be pinned while a forward or a backward is under way.

    States, calls, and the state after the call; "error" is a RuntimeError that names the call and the state:

    ======  ============  ======  ==========  ======  ========  ======
    state   start_gather  wait    release     pin     unpin     commit
    ======  ============  ======  ==========  ======  ========  ======
    ABSENT  COMING        error   ABSENT      PINNED  error     error
    COMING  COMING        HERE    ABSENT (1)  PINNED  error     error
    HERE    HERE          HERE    ABSENT (2)  PINNED  error     error
    PINNED  PINNED        PINNED  PINNED      PINNED  (3)       PINNED
    ======  ============  ======  ==========  ======  ========  ======

    (1) COMING if the gather fails. (2) HERE for parameters that are always here. (3) PINNED while others pin the unit,
    too. Else HERE if a module has called `start_gather` and not yet `release`, or if the parameters are always here;
    else ABSENT.

    Args:
        dtype: of the full buffer.
        own: the range of the full buffer that this rank owns.
        communicator: of the ranks that share the unit.
    """

    comes_and_goes: ClassVar[bool]
    """Whether the parameters have no values between two uses."""
    is_read_by_peers: ClassVar[bool] = False
    """Whether other ranks read this rank's `own_params` where they are. After writing there, all ranks need a
    barrier."""
    all_gathers_updates: ClassVar[bool] = False
    """Whether an update of `own_params` must be all-gathered, as nothing else brings it to the other ranks."""

    own_params: Tensor

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        own: range,
        communicator: Communicator,
    ) -> None:
        self.layout = layout
        self.parameters = parameters
        self.dtype = dtype
        self.own = own
        self.communicator = communicator
        self.state = Residency.ABSENT
        self._pins = 0
        self._places: list[int] = []  # where each parameter was when this residence last moved the parameters

    @property
    @abstractmethod
    def params(self) -> Tensor:
        """The full buffer, with or without memory."""

    @property
    @abstractmethod
    def gathered_bytes(self) -> int:
        """Memory that this rank spends on full parameters and does not keep."""

    @property
    def home_storage(self) -> int:
        """What identifies the storage of memory that comes and goes: 0 where there is none. A release may change it."""
        return 0

    @property
    def is_pinned(self) -> bool:
        """Whether somebody has pinned the parameters."""
        return self.state is Residency.PINNED

    def part(self, full: Tensor) -> Tensor:
        """This rank's own range of a full buffer, as a view."""
        return full[self.own.start : self.own.stop]

    def own_slices(self) -> list[ShardSlice]:
        """The parts of parameters that lie in this rank's own range, in order."""
        return self.layout.slices(self.own)

    @abstractmethod
    def take(self) -> None:
        """The parameters become views of this memory; `own_params` must have the values. Called once."""

    @abstractmethod
    def abandon(self, parameters: list[nn.Parameter]) -> None:
        """These parameters are ordinary ones again, but for those that come and go: nobody has their values any more,
        and their use raises until they are given memory. Nothing else is called after this."""

    @abstractmethod
    def start_gather(self) -> None:
        """A module is about to compute with the parameters. All ranks call this for the same units in the same
        order."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when the parameters can be used.

        Raises:
            CommunicationError: the gather failed.
            RuntimeError: nobody has called `start_gather`.
        """

    def join(self) -> None:
        """The current stream uses the parameters, if they are here, whichever stream has waited for them."""
        return

    @abstractmethod
    def release(self, *, gives_away: bool = False) -> None:
        """Nothing computes with the parameters any more. Legal in every state.

        Args:
            gives_away: tensors that nobody knows of may be views of the parameters. Memory that would go stays with
                these tensors for as long as they last, and the next gather takes other memory.
        """

    @abstractmethod
    def pin(self) -> None:
        """Brings the values into memory that belongs to this rank alone, until the matching `unpin`. A collective."""

    @abstractmethod
    def unpin(self) -> None:
        """The reverse of `pin`. What was written in between and not committed is forgotten.

        Raises:
            RuntimeError: the parameters are not pinned.
        """

    @abstractmethod
    def commit(self, parameters: list[nn.Parameter]) -> None:
        """What was written into these parameters, the same on every rank, becomes their values. A collective.

        Raises:
            RuntimeError: the parameters are not pinned.
        """

    def settle(self) -> None:
        """No copy to the device reads `own_params` any more, so that the host may write there. The host waits."""
        return

    @abstractmethod
    def readable(self) -> list[Tensor] | None:
        """The values of all parameters, if they can be read now and without pinning; None: pin first."""

    def moved(self) -> Iterator[Slot]:
        """The parameters whose memory somebody replaced, by assigning `.data` for instance."""
        places = self._current_places()
        if places == self._places:  # almost always
            return
        for slot, now, then in zip(self.layout.slots, places, self._places, strict=True):
            if now != then:
                yield slot

    @abstractmethod
    def _current_places(self) -> list[int]:
        """For each parameter a number that changes when somebody replaces the parameter's memory."""

    def _views_of(self, full: Tensor) -> list[Tensor]:
        return [full[slot.in_unit].view(slot.shape) for slot in self.layout.slots]

    def _point_to(self, views: list[Tensor]) -> None:
        """Exchanges the memory of the parameters, which stay the same objects with the same versions."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view

    def _require(self, call: str, *legal: Residency) -> None:
        if self.state not in legal:
            names = " or ".join(state.name for state in legal)
            first = self.layout.slots[0].name if self.layout.slots else ""
            raise RuntimeError(
                f"{call}() of the unit of parameter '{first}' in the state {self.state.name} ({self.state.value}): "
                f"the call is legal in {names} only"
            )
