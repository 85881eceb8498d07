"""Writes of a program into 16-bit parameters, on their way into the masters: those that nothing counts, too."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from partita.device import HostCopy, Streams
from partita.units import Unit

logger = logging.getLogger("partita")

# Updates before which all 16-bit parameters are compared with their masters: the first ones, and every so many. A
# program that writes through `.data` mostly does so after every step: the first steps show it.
FIRST_LOOKS = 3
LOOKS_EVERY = 100


class UncountedWrites:
    """Brings what a program wrote into the masters, before every update.

    On a GPU the masters take what a comparison finds without the host. What was found is read before the next update,
    so the warning comes one step later.

    Args:
        units: that are trained.
    """

    def __init__(self, units: Sequence[Unit], streams: Streams) -> None:
        self._units = units
        self._streams = streams
        self._updates = 0
        self._asked: tuple[list[Unit], HostCopy] | None = None  # see `Unit.adopt_unseen`

    def adopt(self) -> None:
        """An update is about to read the masters."""
        looks = self._updates < FIRST_LOOKS or self._updates % LOOKS_EVERY == 0
        self._updates += 1
        found = self._learn()
        places = {}
        for unit in self._units:
            # Where the update is the host's, the host waits for the device anyway.
            if looks and self._streams.is_asynchronous and not unit.offloads:
                places[unit] = unit.adopt_unseen()
            else:
                found.append(unit.adopt_written_parameters(looks=looks))
        asked = {unit: place for unit, place in places.items() if place is not None}
        if asked:
            self._asked = (list(asked), self._streams.copy_to_host(torch.stack(list(asked.values()))))
        self._warn(next((name for name in found if name is not None), None))

    def _learn(self) -> list[str | None]:
        """The parameters whose writes were found before the last update."""
        if self._asked is None:
            return []
        (units, places), self._asked = self._asked, None
        return [unit.has_unseen(place) for unit, place in zip(units, places.wait().tolist(), strict=True)]

    def _warn(self, name: str | None) -> None:
        if name is not None:
            logger.warning(
                "parameter '%s' was written through .data or from outside of torch, which nothing counts. The masters "
                "take it, and from now on every step compares all parameters. Write under torch.no_grad() and without "
                ".data: other such writes may have been lost",
                name,
            )
