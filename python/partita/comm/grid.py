"""Which ranks of a job communicate for what."""

from __future__ import annotations

from collections.abc import Callable

from partita.comm.communicator import Communicator, SingleProcess


class ProcessGrid:
    """The axes of a job."""

    def __init__(self, connect: Callable[..., Communicator]) -> None:
        self._connect = connect
        self.world = connect()
        self.data = self.world
        self.pipe: Communicator = SingleProcess(self.world.device)
        self._beside: list[Communicator] = []

    def beside_data(self) -> Communicator:
        """Another communicator of the data-parallel ranks, whose collectives have an order of their own."""
        self._beside.append(self._connect(beside=self.data))
        return self._beside[-1]

    def close(self) -> None:
        """Leaves all groups."""
        for communicator in self._beside:
            communicator.close()
        self.world.close()
