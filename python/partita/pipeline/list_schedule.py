"""A list scheduler: whenever a rank is free, it begins the most urgent action that is ready and fits its memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import Protocol

from partita.pipeline.schedule import Action, Schedule, ScheduleError, schedule_of
from partita.pipeline.simulate import Costs


class Order(Protocol):
    """Which forward or input gradient a rank begins next."""

    def arrives(self, at: float, action: Action) -> None:
        """What an action takes is there from a time on."""

    def take(self, now: float, free_bytes: float) -> Action | None:
        """The action that begins now; None: none can, with so much memory for activations."""


class InOrder:
    """As they are given; one that is not ready, or does not fit, holds up the others."""

    def __init__(self, actions: Sequence[Action], activation_bytes: Sequence[float]) -> None:
        self._left = deque(actions)
        self._bytes = activation_bytes
        self._there: dict[Action, float] = {}

    def arrives(self, at: float, action: Action) -> None:
        """As in `Order`."""
        self._there[action] = at

    def take(self, now: float, free_bytes: float) -> Action | None:
        """As in `Order`."""
        if not self._left or self._there.get(self._left[0], now + 1) > now:
            return None
        kind, stage, _ = self._left[0]
        if kind == "F" and self._bytes[stage] > free_bytes:
            return None
        return self._left.popleft()


class MostUrgent:
    """Input gradients, as others wait for them, then forwards, those of late stages first.

    A forward leaves memory for one activation of each later stage: so the oldest micro-batch always goes on.
    """

    def __init__(self, stages: Sequence[int], activation_bytes: Sequence[float]) -> None:
        self._inputs: dict[int, deque[tuple[float, Action]]] = {stage: deque() for stage in stages}
        self._forwards: dict[int, deque[tuple[float, Action]]] = {stage: deque() for stage in reversed(stages)}
        later = accumulate(activation_bytes[stage] for stage in reversed(stages))
        self._bytes = dict(zip(reversed(stages), later, strict=True))

    def arrives(self, at: float, action: Action) -> None:
        """As in `Order`."""
        (self._forwards if action.kind == "F" else self._inputs)[action.stage].append((at, action))

    def take(self, now: float, free_bytes: float) -> Action | None:
        """As in `Order`."""
        inputs = [queue for queue in self._inputs.values() if queue and queue[0][0] <= now]
        if inputs:
            return min(inputs, key=lambda queue: queue[0][1].micro_batch).popleft()[1]
        for stage, queue in self._forwards.items():
            if queue and queue[0][0] <= now and self._bytes[stage] <= free_bytes:
                return queue.popleft()[1]
        return None


def list_schedule(
    stage_ranks: Sequence[int],
    micro_batches: int,
    costs: Costs,
    memory_bytes: Sequence[float],
    orders: Sequence[Order] | None = None,
) -> Schedule:
    """A schedule with split backwards, for stages of these costs.

    Weight gradients fill the time in which a rank can begin nothing else. Source: the heuristic of Qi et al. 2023,
    arXiv:2401.10241, section 3.1, here for any placement of stages.

    Args:
        memory_bytes: for activations and what weight gradients wait with, by rank.
        orders: of forwards and input gradients, by rank; None: the most urgent first.

    Raises:
        ScheduleError: the activations of one micro-batch do not fit a rank, or those that the orders need.
    """
    costs.require_fit(len(stage_ranks))
    ranks = []
    for rank, limit in enumerate(memory_bytes):
        own = [stage for stage, its_rank in enumerate(stage_ranks) if its_rank == rank]
        order = orders[rank] if orders else MostUrgent(own, costs.activation_bytes)
        ranks.append(_Rank(rank, own, costs, limit, order))
    last = len(stage_ranks) - 1
    for m in range(micro_batches):
        ranks[stage_ranks[0]].next.arrives(0.0, Action("F", 0, m))
    events = [(0.0, rank) for rank in range(len(ranks))]
    while events:
        now, rank = heappop(events)
        action = ranks[rank].begin(now)
        if action is None:
            continue
        kind, stage, m = action
        end = ranks[rank].free
        heappush(events, (end, rank))
        follows = None
        if kind == "F":
            follows = Action("F", stage + 1, m) if stage < last else Action("I", stage, m)
        elif kind == "I" and stage > 0:
            follows = Action("I", stage - 1, m)
        if follows is not None:
            to = stage_ranks[follows.stage]
            there = end if to == rank else end + costs.transfer(stage if kind == "F" else follows.stage)
            ranks[to].next.arrives(there, follows)
            heappush(events, (max(there, ranks[to].free), to))
    orders_made = [rank.made for rank in ranks]
    if sum(map(len, orders_made)) != 3 * len(stage_ranks) * micro_batches:
        raise ScheduleError(f"memory for {list(memory_bytes)} bytes of activations does not do for this order")
    return schedule_of(stage_ranks, micro_batches, orders_made)


class _Rank:
    """A rank, its memory, and the weight gradients that wait.

    Attributes:
        made: its actions so far.
        free: from when on it may begin the next.
    """

    def __init__(self, rank: int, stages: Sequence[int], costs: Costs, limit: float, order: Order) -> None:
        self.made: list[Action] = []
        self.free = 0.0
        self.next = order
        self._costs = costs
        self._limit = limit
        self._held = 0.0
        self._weights: deque[Action] = deque()
        needed = sum(costs.activation_bytes[stage] for stage in stages)
        if needed > limit:
            raise ScheduleError(
                f"one micro-batch has {needed:,} bytes of activations on rank {rank}, which has memory for {limit:,}"
            )

    def begin(self, now: float) -> Action | None:
        """The action that begins now; None: the rank is busy, or nothing can begin."""
        if now < self.free:
            return None
        action = self.next.take(now, self._limit - self._held)
        if action is None and self._weights:
            action = self._weights.popleft()
        if action is None:
            return None
        kind, stage, m = action
        activation, kept = self._costs.activation_bytes[stage], self._costs.weight_bytes[stage]
        self._held += activation if kind == "F" else kept - activation if kind == "I" else -kept
        if kind == "I":
            self._weights.append(Action("W", stage, m))
        self.made.append(action)
        self.free = now + self._costs.of(action)
        return action
