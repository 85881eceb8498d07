"""A model whose parameters are gathered by one rank without an engine: its shards are on the host."""

from __future__ import annotations

from partita.comm import SingleProcess
from partita.device import HostStreams, Streams
from partita.units import Offload, ParameterLifetimes, UnitSettings, build_units, stage_policy
from torch import nn


class Untrained:
    """A conductor of backwards that train nothing."""

    is_training = False

    def past(self, units: object) -> None:
        """There is nothing to reduce."""


def gathered(model: nn.Module, streams: Streams | None = None) -> ParameterLifetimes:
    """The lifetimes of a model whose parameters are gathered: with shards on the host, one rank gathers, too."""
    communicator = SingleProcess()
    units = build_units(
        model,
        [(name, p, 0) for name, p in model.named_parameters()],
        {},
        UnitSettings(1000, offload=Offload(states=1.0, params=True)),
        communicator=communicator,
        gathering=communicator,
        policy=stage_policy(3),
        streams=streams or HostStreams(),
    )
    return ParameterLifetimes(units.groups, communicator, 0, 10**6, Untrained())


def two_blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
