"""The order of gathers in one forward or backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from partita.units.build import ParameterGroup


class GatherPass:
    """One way through the blocks: which of them have been sent for.

    Every block is in one of three places: left (not sent for), ahead (sent for, and not needed yet) or done. The blocks
    ahead come before the blocks left, and both are in the order of the pass. So the blocks are sent for in that order,
    whatever this rank needs. See [Note: order of gathers] in `lifetimes.py`.
    """

    def __init__(self, order: Iterable[int], groups: Sequence[ParameterGroup]) -> None:
        self._left = list(order)
        self._groups = groups
        self._ahead: list[int] = []
        self._numel_ahead = 0

    def is_to_come(self, index: int) -> bool:
        """Whether this block has not been needed yet."""
        return index in self._ahead or index in self._left

    def up_to(self, index: int) -> list[int]:
        """Sends for all blocks up to this one, which is to come.

        Returns the blocks in between, which this rank skips: they are sent for as well, and must be released.
        """
        skipped, self._ahead = self._ahead, []
        if index in skipped:
            end = skipped.index(index)
            self._ahead = skipped[end + 1 :]
            self._numel_ahead -= sum(self._groups[i].numel for i in skipped[: end + 1])
            return skipped[:end]
        self._numel_ahead = 0
        while (first := self._left.pop(0)) != index:
            self.start_gather(first)
            skipped.append(first)
        self.start_gather(index)
        return skipped

    def ahead(self, numel: int, room: int) -> None:
        """Sends for the next block, and for more blocks while all that are ahead have at most `numel` elements.

        No block is sent for if the blocks ahead would have more than `room` elements.
        """
        while self._left:
            sent = self._numel_ahead + self._groups[self._left[0]].numel
            if sent > room or (self._ahead and sent > numel):
                return
            self._numel_ahead = sent
            self._ahead.append(self._left.pop(0))
            self.start_gather(self._ahead[-1])

    def rest(self) -> Iterable[int]:
        """Yields the blocks that were not needed, one by one; the caller releases each before it asks for the next."""
        while self._ahead:
            yield self._ahead.pop(0)
        while self._left:
            self.start_gather(self._left[0])
            yield self._left.pop(0)

    def start_gather(self, index: int) -> None:
        """Starts the gathers of a group, whatever the order."""
        for unit in self._groups[index].units:
            unit.residence.start_gather()
