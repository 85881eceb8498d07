"""The proof that a schedule can run: everything once, in an order that ends, and what it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from partita.pipeline.schedule import Action, Links, Made, Schedule, ScheduleError, all_actions, made_by

# What is sent: the output ("F") or the input gradient ("B") of a stage and a micro-batch, and the stage that takes it.
Sent = tuple[str, int, int, int]
Pair = tuple[int, int]  # sender, receiver


@dataclass(frozen=True)
class Proof:
    """What a schedule that can run needs, by rank; counts, not bytes.

    Attributes:
        activations: the most (stage, micro-batch) whose forward was made, and whose backward (B or I) was not.
        waiting_weights: the most whose I was made, and whose W was not.
        held: the most of both together.
        received: the most tensors that were received, or for which a receive is posted, and that are not yet used.
        order: all (rank, action), each after what it takes.
        reduced_after: for each stage, the action after which its gradients are complete; None where nothing is trained.
    """

    activations: tuple[int, ...]
    waiting_weights: tuple[int, ...]
    held: tuple[int, ...]
    received: tuple[int, ...]
    order: tuple[tuple[int, Action], ...]
    reduced_after: tuple[Action | None, ...]


def prove(schedule: Schedule, skips: Iterable[tuple[int, int]] = (), window: int | None = None) -> Proof:
    """Proves that a schedule does everything once, and that it comes to an end on any transport.

    The transport is the worst that there is. A send is matched only by a receive that was posted (rendezvous). What a
    rank sends to another goes through one queue, in order. A rank goes on after a send, and keeps the tensor until it
    was received. Before an action a rank posts the receives of what the action takes, and of what comes before that in
    the same queue: tensors that were sent early take memory.

    Args:
        skips: (from, to) of stages, as of skip connections, beside the chain.
        window: tensors that may be under way from a rank to another before the sender waits; None: it never does.

    Raises:
        ScheduleError: the counterexample; a deadlock is drawn as the circle of ranks that wait for each other.
    """
    links = Links(schedule.num_stages, skips)
    _require_complete(schedule)
    progress = _Progress(schedule, links, window)
    progress.run()
    if any(progress.next_of(rank) is not None for rank in range(schedule.num_ranks)):
        raise ScheduleError(_deadlock(schedule, progress))
    return _needs(schedule, progress)


def _require_complete(schedule: Schedule) -> None:
    """Every (stage, micro-batch) has one forward and one backward, on the rank that has the stage."""
    found: Counter[Action] = Counter()
    for rank, action in all_actions(schedule):
        if not (0 <= action.stage < schedule.num_stages and 0 <= action.micro_batch < schedule.micro_batches):
            raise ScheduleError(
                f"rank {rank} has {action}: there are the stages 0 to {schedule.num_stages - 1} and the micro-batches "
                f"0 to {schedule.micro_batches - 1}"
            )
        if schedule.stage_ranks[action.stage] != rank:
            raise ScheduleError(
                f"rank {rank} has {action}: stage {action.stage} is on rank {schedule.stage_ranks[action.stage]}"
            )
        found[action] += 1
        if found[action] > 1:
            raise ScheduleError(f"rank {rank} has {action} twice")
    for stage in range(schedule.num_stages):
        for m in range(schedule.micro_batches):
            _require_one_backward(schedule, found, stage, m)


def _require_one_backward(schedule: Schedule, found: Counter[Action], stage: int, m: int) -> None:
    rank = schedule.stage_ranks[stage]
    forward, joint, inputs, weights = (Action(kind, stage, m) in found for kind in ("F", "B", "I", "W"))
    if not forward:
        raise ScheduleError(f"{stage}F{m} is missing on rank {rank}")
    if joint and (inputs or weights):
        raise ScheduleError(f"rank {rank} has {stage}B{m}, and the same again as {stage}I{m} or {stage}W{m}")
    if inputs != weights:
        has, lacks = ("I", "W") if inputs else ("W", "I")
        raise ScheduleError(f"rank {rank} has {stage}{has}{m} without {stage}{lacks}{m}")
    if not (schedule.is_forward_only or joint or inputs):
        raise ScheduleError(f"{stage}B{m} (or {stage}I{m} and {stage}W{m}) is missing on rank {rank}")


class _Progress:
    """Ranks that go on as far as they can. In which order does not matter: nothing that a rank waits for is ever taken
    away, so all orders end alike.

    Attributes:
        order: what has been done, each action after what it takes.
        most_received: by rank, see `Proof.received`.
    """

    def __init__(self, schedule: Schedule, links: Links, window: int | None) -> None:
        self.order: list[tuple[int, Action]] = []
        self._schedule = schedule
        self._links = links
        self._window = window
        self._made: set[Made] = set()
        self._places = [0] * schedule.num_ranks
        self._waiting: dict[Made | Pair, list[int]] = {}  # ranks, by what they wait for
        self._received = [0] * schedule.num_ranks  # and not yet used
        self.most_received = [0] * schedule.num_ranks
        self._sent: Counter[Pair] = Counter()
        self._posted: Counter[Pair] = Counter()
        self._number = {  # of what is sent, in its queue
            item: number for queue in queues_of(schedule, links).values() for number, item in enumerate(queue, start=1)
        }

    def run(self) -> None:
        """Until no rank can go on."""
        ready = list(range(self._schedule.num_ranks))
        while ready:
            rank = ready.pop()
            while (action := self.next_of(rank)) is not None:
                for pair in self._post(rank, action):
                    ready += self._waiting.pop(pair, [])
                cause = self.lacks(rank)
                if cause is not None:
                    self._waiting.setdefault(cause, []).append(rank)
                    break
                self._places[rank] += 1
                self.order.append((rank, action))
                self._received[rank] -= sum(1 for _ in self._received_by(action))
                for made in made_by(action):
                    self._made.add(made)
                    ready += self._waiting.pop(made, [])
                for _, pair in self._sends(action):
                    self._sent[pair] += 1

    def next_of(self, rank: int) -> Action | None:
        """The action that a rank stands before; None: it has done all."""
        actions, place = self._schedule.actions[rank], self._places[rank]
        return actions[place] if place < len(actions) else None

    def lacks(self, rank: int) -> Made | Pair | None:
        """What keeps a rank from its next action: what nobody has made, or a queue that is full. None: nothing."""
        action = self.next_of(rank)
        if self._window is not None and self._places[rank]:
            before = self._schedule.actions[rank][self._places[rank] - 1]
            for _, pair in self._sends(before):
                if self._sent[pair] - self._posted[pair] > self._window:
                    return pair
        if action is None:
            return None
        return next((made for made in self._links.taken_by(action) if made not in self._made), None)

    def _post(self, rank: int, action: Action) -> Iterator[Pair]:
        """The receives before an action; yields the queues that have moved."""
        for item, pair in self._received_by(action):
            more = self._number[item] - self._posted[pair]
            if more > 0:
                self._posted[pair] += more
                self._received[rank] += more
                self.most_received[rank] = max(self.most_received[rank], self._received[rank])
                yield pair

    def _received_by(self, action: Action) -> Iterator[tuple[Sent, Pair]]:
        """What an action takes of other ranks, and from where to where it goes."""
        for what, stage, m in self._links.taken_by(action):
            pair = (self._schedule.stage_ranks[stage], self._schedule.stage_ranks[action.stage])
            if pair[0] != pair[1]:
                yield (what, stage, m, action.stage), pair

    def _sends(self, action: Action) -> Iterator[tuple[Sent, Pair]]:
        return sends(action, self._schedule, self._links)


def _deadlock(schedule: Schedule, progress: _Progress) -> str:
    """Draws a circle of waiting ranks."""
    rank = next(rank for rank in range(schedule.num_ranks) if progress.next_of(rank) is not None)
    lines: list[str] = []
    ranks: list[int] = []
    while rank not in ranks:
        ranks.append(rank)
        action, cause = progress.next_of(rank), progress.lacks(rank)
        assert cause is not None
        if len(cause) == 2:
            other = cause[1]
            text = f"has sent rank {other} all that may be under way"
        else:
            kind, stage, m = cause
            other = schedule.stage_ranks[stage]
            text = f"waits for {stage}{_named(schedule, kind, stage, m)}{m} of rank {other}"
        lines.append(f"  rank {rank} stands before {action} and {text}")
        rank = other
    begin = ranks.index(rank)
    circle = " -> ".join(map(str, [*ranks[begin:], rank]))
    return "\n".join([f"deadlock, ranks {circle}:", *lines[begin:]])


def _named(schedule: Schedule, kind: str, stage: int, m: int) -> str:
    """The kind of the action that makes something."""
    if kind == "B" and Action("I", stage, m) in schedule.actions[schedule.stage_ranks[stage]]:
        return "I"
    return kind


def _needs(schedule: Schedule, progress: _Progress) -> Proof:
    ranks = range(schedule.num_ranks)
    live, peak_live = [0 for _ in ranks], [0 for _ in ranks]
    waits, peak_waits = [0 for _ in ranks], [0 for _ in ranks]
    peak_held = [0 for _ in ranks]
    reduced: list[Action | None] = [None] * schedule.num_stages
    for rank, action in progress.order:
        if action.kind == "F":
            live[rank] += not schedule.is_forward_only
        elif action.kind == "I":
            live[rank] -= 1
            waits[rank] += 1
        elif action.kind == "B":
            live[rank] -= 1
        else:
            waits[rank] -= 1
        if action.kind in "BW":
            reduced[action.stage] = action
        peak_live[rank] = max(peak_live[rank], live[rank])
        peak_waits[rank] = max(peak_waits[rank], waits[rank])
        peak_held[rank] = max(peak_held[rank], live[rank] + waits[rank])
    return Proof(
        activations=tuple(peak_live),
        waiting_weights=tuple(peak_waits),
        held=tuple(peak_held),
        received=tuple(progress.most_received),
        order=tuple(progress.order),
        reduced_after=tuple(reduced),
    )


def queues_of(schedule: Schedule, links: Links) -> dict[Pair, list[Sent]]:
    """What goes from a rank to another, in the order in which it is sent, by (sender, receiver)."""
    queues: dict[Pair, list[Sent]] = {}
    for _, action in all_actions(schedule):
        for item, pair in sends(action, schedule, links):
            queues.setdefault(pair, []).append(item)
    return queues


def sends(action: Action, schedule: Schedule, links: Links) -> Iterator[tuple[Sent, Pair]]:
    """What goes to other ranks after an action, and from where to where."""
    for what, stage, m in made_by(action)[-1:]:
        for to in links.takers(what, stage):
            pair = (schedule.stage_ranks[stage], schedule.stage_ranks[to])
            if pair[0] != pair[1]:
                yield (what, stage, m, to), pair
