"""Parameters that are on every rank all the time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.units.absent import make_present
from partita.units.layout import UnitLayout
from partita.units.residence.base import Residence, Residency


class Always(Residence):
    """The parameters are views of the full buffer for good, so no call moves anything.

    The states are HERE and PINNED. Written values are the values at once: there is no other copy.
    """

    comes_and_goes = False
    all_gathers_updates = True

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        own: range,
        communicator: Communicator,
    ) -> None:
        super().__init__(layout, parameters, dtype, own, communicator)
        self.state = Residency.HERE
        self._params = communicator.empty(layout.numel, dtype)
        self.own_params = self.part(self._params)

    @property
    def params(self) -> Tensor:
        return self._params

    @property
    def gathered_bytes(self) -> int:
        return 0

    def take(self) -> None:
        make_present(self.parameters)  # zero.Init() may have taken their values away
        self._point_to(self._views_of(self._params))
        self._places = self._current_places()

    def abandon(self, parameters: list[nn.Parameter]) -> None:
        return  # they keep their values

    def start_gather(self) -> None:
        return

    def wait(self) -> None:
        return

    def release(self, *, gives_away: bool = False) -> None:
        return

    def pin(self) -> None:
        self._pins += 1
        self.state = Residency.PINNED

    def unpin(self) -> None:
        self._require("unpin", Residency.PINNED)
        self._pins -= 1
        self.state = Residency.PINNED if self._pins else Residency.HERE

    def commit(self, parameters: list[nn.Parameter]) -> None:
        self._require("commit", Residency.PINNED)

    def readable(self) -> list[Tensor] | None:
        return [parameter.detach() for parameter in self.parameters]

    def _current_places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]
