"""Parameters whose shards lie in memory that all ranks of a host have in their address space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partita.comm import Communicator
from partita.units.absent import make_present
from partita.units.layout import UnitLayout
from partita.units.residence.transient import Transient


class Mapped(Transient):
    """One full buffer per host. Each rank's shard of it is memory of that rank, and every rank sees the whole buffer.

    Nothing is gathered: while a module computes, its parameters are views of the mapped buffer. The home is needed for
    pinning only. A pinned unit must be writable without any effect on other ranks, so pinning copies the mapped values
    into the home.

    Raises:
        ValueError: the ranks share no memory.
    """

    is_read_by_peers = True

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        own: range,
        communicator: Communicator,
    ) -> None:
        mapped = communicator.mapped(layout.numel, dtype)
        if mapped is None:
            raise ValueError(f"ranks over {communicator.transport} share no memory: gather the parameters instead")
        super().__init__(layout, parameters, dtype, own, communicator, home=torch.empty_like(mapped))
        self._mapped = mapped
        self._mapped_views = self._views_of(mapped)
        self.own_params = self.part(mapped)

    @property
    def params(self) -> Tensor:
        return self._mapped

    def readable(self) -> list[Tensor] | None:
        return self._mapped_views

    def _start(self) -> None:
        make_present(self.parameters)  # first, as .data of an absent parameter cannot be set
        self._point_to(self._mapped_views)

    def _finish(self) -> None:
        """Nothing is under way: the mapped values have been there all the time."""

    def _bring_home(self) -> None:
        self._allocate_home()
        self._home.copy_(self._mapped)
        make_present(self.parameters)
        # What a forward under way saved of the parameters are views of the mapped buffer. They stay valid: the mapped
        # buffer lasts.
        self._point_to(self._home_views)

    def _leave(self) -> None:
        # Absent parameters are views of the home, whose storage has no memory then: a use that slips past
        # AbsentParameter, inside autograd for instance, is refused by torch and cannot read or write mapped values.
        self._point_to(self._home_views)
        super()._leave()
