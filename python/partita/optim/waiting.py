"""Parameters that a program freezes in the midst of a training: they stand still, and their states wait."""

from __future__ import annotations

from collections.abc import Iterable

from partita.units import Slot, Unit


def frozen_slots(units: Iterable[Unit]) -> list[frozenset[Slot]]:
    """For each unit the parameters that do not require gradients now."""
    return [unit.frozen_slots() for unit in units]


class WaitedSteps:
    """How many applied steps each parameter has waited, so that its own count of steps is that of the run less these.

    Steps are counted by whoever updates: `taken` is the number of applied steps before the one at hand.
    """

    def __init__(self) -> None:
        self._waited: dict[str, int] = {}  # by name; of parameters that do not wait now
        self._since: dict[str, int] = {}  # by name; of parameters that wait: the steps that had been applied

    def begin(self, frozen: Iterable[str], taken: int) -> None:
        """These parameters, and no others, have no part in the step at hand."""
        names = set(frozen)
        for name in self._since.keys() - names:
            self._waited[name] = self._waited.get(name, 0) + taken - self._since.pop(name)
        for name in names - self._since.keys():
            self._since[name] = taken

    def of(self, name: str) -> int:
        """The steps that a parameter has waited, which does not wait now."""
        return self._waited.get(name, 0)

    def after(self, taken: int) -> dict[str, int]:
        """The steps that each parameter has waited when so many have been applied; without those that never did."""
        names = self._waited.keys() | self._since.keys()
        waited = {name: self.of(name) + taken - self._since.get(name, taken) for name in names}
        return {name: steps for name, steps in sorted(waited.items()) if steps}

    def load(self, waited: dict[str, int]) -> None:
        """Takes what `after()` gave. Which parameters wait is said by the next step."""
        self._waited, self._since = dict(waited), {}
