"""Parameters that are gathered from the ranks' shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partita.comm import Communicator, Done, Handle
from partita.device.memory import flat_buffer, host_buffer
from partita.device.streams import AcrossStreams, HostCopy, Streams
from partita.units.layout import UnitLayout
from partita.units.policy import RESIDENT, Offload
from partita.units.residence.base import Residency
from partita.units.residence.transient import Transient


class Gathered(Transient):
    """Each rank keeps its shard. The home is the full buffer, and is filled by an all-gather of the shards.

    [Note: streams of a home]
    The stream that waits for a gather first makes the home ready; other streams wait for that moment when they use the
    parameters. torch's allocator gives the memory of a home to what is queued next on the stream on which it was
    allocated. So before the memory goes, that stream waits for all others that used it.

    Args:
        streams: of the device that computes.
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
        streams: Streams,
        gathering: Communicator | None = None,
        offload: Offload = RESIDENT,
    ) -> None:
        device = communicator.device
        home = torch.empty(layout.numel, dtype=dtype, device=device)
        super().__init__(layout, parameters, dtype, own, communicator, home)
        self._gathering = gathering or communicator
        self._handle: Handle = Done()  # of the gather under way
        self._streams = streams
        self._home_stream = streams.current()  # on which the home's memory was allocated
        self._users = AcrossStreams(streams)  # of the home
        self._brought: HostCopy | None = None  # the last one that read a shard on the host
        self._is_on_host = offload.params
        if self._is_on_host:
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
        if not self._is_on_host:
            self._handle = self._gathering.all_gather_into(self._home, self.own_params)
            return
        # A shard on the host takes its place in the full buffer first. A gather begins after what the current stream
        # has been given: here that is the copy, and not what computes beside it.
        with self._streams.to_device():
            self._brought = self._streams.bring(self.part(self._home), self.own_params)
            self._handle = self._gathering.all_gather(self._home)

    def _finish(self) -> None:
        if self._brought is not None:
            self._brought.come_after()  # where one rank is alone, nothing else waits for the copy
        self._handle.wait()  # if this raises, the handle stays: release() must know that the gather was not completed
        self._handle = Done()
        self._users.is_ready()

    def join(self) -> None:
        self._users.use()

    def settle(self) -> None:
        if self._brought is not None:
            self._brought.wait()
            self._brought = None

    def _allocate_home(self) -> None:
        self._home_stream = self._streams.current()
        super()._allocate_home()

    def _free_home(self) -> None:
        self._users.give_up(self._home_stream)
        super()._free_home()

    def _bring_home(self) -> None:
        if self.state is Residency.ABSENT:
            self._start()
            self.state = Residency.COMING
        self.wait()  # parameters that are here already are in memory of this rank's own
