"""The order of gathers in one forward or backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.comm import Communicator, ranks_that_differ
from partita.units.build import ParameterGroup
from partita.units.residence import Residency


class BlockOrder:
    """The order of the blocks in a forward: that in which the first forward uses them, if it is the same on all ranks.

    Attributes:
        blocks: all of them, in this order. Until the first forward is over, as in the model.
    """

    def __init__(self, count: int) -> None:
        self.blocks = list(range(count))
        self._used: list[int] | None = []  # None: the order is settled

    def note(self, index: int) -> None:
        """A forward uses a block."""
        if self._used is not None and index not in self._used:
            self._used.append(index)

    def settle(self, communicator: Communicator, again: bool) -> None:
        """A forward of the whole model is over. A collective, the first time. again: this forward does not count."""
        if self._used is None or not self.blocks:
            return
        if again:
            self._used = []
            return
        used = [*self._used, *(i for i in self.blocks if i not in self._used)]
        self._used = None
        if not ranks_that_differ(communicator, repr(used).encode()):
            self.blocks = used


class Reuses:
    """Uses of blocks after their turn, which gather the blocks again: rule 5 of [Note: order of gathers].

    All ranks must do so alike. Ranks that do not would gather different blocks into one buffer, or wait for ever. So
    what is new on this rank waits until all ranks are about to do it. What all have done once is not asked again.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._known: set[int] = set()

    def check(self, index: int, name: str, under_way: GatherPass) -> None:
        """A block is about to be gathered again. name: of its first parameter.

        Raises:
            CommunicationError: another rank does something else.
        """
        number, turns = under_way.use_again(index)
        if number not in self._known:
            self._communicator.come_together(
                f"the gather of '{name}' and what is with it, used again after {turns} blocks of a forward or backward,"
            )
            self._known.add(number)


@dataclass(frozen=True)
class Ahead:
    """How far gathers run ahead of what computes. All ranks have the same.

    Attributes:
        numel: elements of the blocks that are sent for beyond the next one, together with that, at most.
        room: elements of the block that computes and of all that are sent for ahead of it, at most.
    """

    numel: int
    room: int

    def reach(self, blocks: Sequence[int]) -> list[int]:
        """How many blocks of a pass have been sent for when one of them computes, and before the first (entry 0).

        The answer depends on the sizes alone, and not on what else is here on one rank.

        Args:
            blocks: elements of each, in the order of the pass.
        """
        reach: list[int] = []
        sent, ahead = 0, 0  # blocks so far; elements of those ahead
        for computing, own in enumerate([0, *blocks]):
            if sent < computing:
                sent = computing
            elif computing:
                ahead -= own
            while sent < len(blocks):
                more = ahead + blocks[sent]
                if own + more > self.room or (sent > computing and more > self.numel):
                    break
                sent, ahead = sent + 1, more
            reach.append(sent)
        return reach


class GatherPass:
    """One way through the blocks: which of them have been sent for.

    A block's place is its number in the order of the pass. Blocks are sent for in this order, whatever this rank needs.
    Those before `_needed` have had their turn. See [Note: order of gathers] in `lifetimes.py`.
    """

    def __init__(self, order: Iterable[int], groups: Sequence[ParameterGroup], ahead: Ahead) -> None:
        self._order = list(order)
        self._groups = groups
        self._place = {index: place for place, index in enumerate(self._order)}
        self._reach = ahead.reach([groups[i].numel for i in self._order])
        self._sent = 0
        self._needed = 0
        self._reduced = 0  # units up to this place may have been reduced
        self._again = 0  # a number for the uses after their turn so far

    @property
    def is_sent(self) -> bool:
        """Whether all blocks have been sent for."""
        return self._sent == len(self._order)

    def is_to_come(self, index: int) -> bool:
        """Whether this block's turn has not come."""
        return self._place.get(index, -1) >= self._needed

    def turn_of(self, index: int) -> list[int]:
        """The turn of a block that is to come: sends for all up to this one.

        Returns the blocks in between, which this rank skips: they are sent for as well, and must be released.
        """
        begin, place = self._needed, self._place[index]
        self._send(place + 1)
        self._needed = place + 1
        return self._order[begin:place]

    def send_ahead(self, index: int) -> None:
        """Sends for the blocks that come while this one computes, or while no block does yet."""
        self._send(self._reach[self._place.get(index, -1) + 1])

    def before_reduction(self, index: int) -> None:
        """Sends for all blocks that are sent for before units of this block are reduced, on whichever rank."""
        self._reduced = max(self._reduced, self._place[index] + 1)
        self._send(self._reach[self._reduced])

    def must_gather_again(self, index: int) -> bool:
        """Whether this is a block whose turn was before, and that has gone since."""
        units = self._groups[index].units if index < len(self._groups) - 1 and not self.is_to_come(index) else []
        return any(unit.residence.state is Residency.ABSENT for unit in units)

    def use_again(self, index: int) -> tuple[int, int]:
        """A block is used after its turn. Returns a number for all such uses so far in a pass of this order, and after
        how many turns this one comes."""
        self._again = hash((self._again, self._needed, index, *self._order))
        return self._again, self._needed

    def rest(self) -> Iterable[int]:
        """Yields the blocks that were not needed, one by one; the caller releases each before it asks for the next."""
        while self._needed < len(self._order):
            self._send(self._needed + 1)
            self._needed += 1
            yield self._order[self._needed - 1]

    def start_gather(self, index: int) -> None:
        """Starts the gathers of a group, whatever the order."""
        for unit in self._groups[index].units:
            unit.residence.start_gather()

    def _send(self, end: int) -> None:
        while self._sent < end:
            self._sent += 1
            self.start_gather(self._order[self._sent - 1])
