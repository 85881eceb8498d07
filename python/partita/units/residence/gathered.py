"""Parameters that are gathered from the ranks' shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partita.comm import Communicator, Done, Handle
from partita.device.memory import flat_buffer, host_buffer
from partita.units.layout import UnitLayout
from partita.units.policy import RESIDENT, Offload
from partita.units.residence.base import Residency
from partita.units.residence.transient import Transient


class Gathered(Transient):
    """Each rank keeps its shard. The home is the full buffer, and is filled by an all-gather of the shards.

    Args:
        gathering: carries the all-gathers; None: `communicator`.
        offload: `params`: the shard is on the host. `pin`: in pinned memory there.
    """

    def __init__(
        self,
        layout: UnitLayout,
        parameters: list[nn.Parameter],
        dtype: torch.dtype,
        own: range,
        communicator: Communicator,
        gathering: Communicator | None = None,
        offload: Offload = RESIDENT,
    ) -> None:
        device = communicator.device
        home = torch.empty(layout.numel, dtype=dtype, device=device)
        super().__init__(layout, parameters, dtype, own, communicator, home)
        self._gathering = gathering or communicator
        self._handle: Handle = Done()  # of the gather under way
        if offload.params:
            self.own_params = host_buffer(len(own), dtype, offload.pin)
        else:
            self.own_params = flat_buffer(len(own), dtype, device)

    @property
    def params(self) -> Tensor:
        return self._home

    def readable(self) -> list[Tensor] | None:
        return None

    def _start(self) -> None:
        self._allocate_home()
        if self.own_params.device == self._home.device:
            self._handle = self._gathering.all_gather_into(self._home, self.own_params)
            return
        # A shard on the host takes its place in the full buffer first. The copy is queued on the current stream, and
        # the gather begins after what that stream has been given.
        self.part(self._home).copy_(self.own_params, non_blocking=True)
        self._handle = self._gathering.all_gather(self._home)

    def _finish(self) -> None:
        self._handle.wait()  # if this raises, the handle stays: release() must know that the gather was not completed
        self._handle = Done()

    def _bring_home(self) -> None:
        if self.state is Residency.ABSENT:
            self._start()
            self.state = Residency.COMING
        self.wait()  # parameters that are here already are in memory of this rank's own
