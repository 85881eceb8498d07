"""What the reduction of gradients is told, and whom it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from partita.units.parameters import FlatParameters
from partita.units.unit import Unit


@dataclass(frozen=True)
class ReductionSettings:
    """How gradients travel.

    communication_dtype: of the reduced buffers; None: the accumulation dtype.
    grad_factor: what every gradient is multiplied by before it is summed over ranks.
    overlap: reduce while backward goes on; otherwise at its end.
    """

    communication_dtype: torch.dtype | None = None
    grad_factor: float = 1.0
    overlap: bool = True


@dataclass(frozen=True)
class BackwardPlan:
    """What becomes of the gradients of one backward.

    reduces: they are reduced over ranks (a boundary), or only accumulated. `factor`: what they are multiplied by, one
    float64 on their device; None: 1.
    """

    reduces: bool
    factor: Tensor | None = None


class BackwardListener(Protocol):
    """Who conducts the backwards of a model part. The reducer tells the listener what it sees of them."""

    def begins(self) -> BackwardPlan:
        """The first gradient of a backward has arrived. The answer says what becomes of the gradients."""

    def may_reduce(self, unit: Unit) -> bool:
        """Whether the gradients of a unit may be reduced now; at the end of a backward all are."""

    def reducing(self, unit: Unit) -> None:
        """The gradients of a unit are about to be reduced."""

    def ended(self) -> None:
        """The reductions of the backward have been launched. Those of gradients that came too late, in the first
        backward, follow."""


class BackwardConductor(Protocol):
    """What the lifetimes ask and tell about the backward under way."""

    @property
    def is_training(self) -> bool:
        """Whether gradients of the backward under way go to an optimizer, and somebody will call `end_backward`."""

    def past(self, units: Sequence[FlatParameters]) -> None:
        """These units get no gradient any more in the backward under way."""
