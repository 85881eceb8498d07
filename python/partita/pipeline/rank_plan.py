"""What one rank of a pipeline does in a step: its actions, with what it receives before and sends after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.pipeline.prove import Proof, Sent, prove, queues_of, sends
from partita.pipeline.schedule import Action, Links, Schedule, ScheduleError

# Messages that may be under way from a rank to another: few take little memory, and some schedules need more. Each may
# have a message before it that describes it, and transports hold 256.
WINDOWS = (4, 16, 64, 120)
HARDWARE_QUEUES = 8  # of a GPU, unless CUDA_DEVICE_MAX_CONNECTIONS says otherwise


@dataclass(frozen=True)
class PlannedAction:
    """An action of a rank.

    Attributes:
        receives: (rank, what it sends): all that must have come, in each queue's order. What is taken later may be
            among them, as it comes before in the same queue.
        sends: (rank, what it gets).
        is_last_of_stage: the gradients of the stage are complete after it.
    """

    action: Action
    receives: tuple[tuple[int, Sent], ...]
    sends: tuple[tuple[int, Sent], ...]
    is_last_of_stage: bool


@dataclass(frozen=True)
class RankPlan:
    """A step of one rank.

    Attributes:
        schedule: of all ranks.
        links: which stages take what from which.
        rank: of the pipeline.
        actions: in their order.
        window: messages that may be under way to another rank before this rank waits, after an action.
    """

    schedule: Schedule
    links: Links
    rank: int
    actions: tuple[PlannedAction, ...]
    window: int

    @property
    def room(self) -> int:
        """Messages to another rank that must find room before a send may wait: the proof has a rank wait after all
        sends of an action, when more than the window are under way, and a send of ours waits before it is one."""
        by_action = (Counter(rank for rank, _ in planned.sends) for planned in self.actions)
        return self.window + max((number for sends in by_action for number in sends.values()), default=0)

    def splits(self, stage: int) -> bool:
        """Whether weight gradients of a stage of this rank wait for an action of their own."""
        return any(a.action.kind == "W" and a.action.stage == stage for a in self.actions)


def plan_of(schedule: Schedule, rank: int, skips: Iterable[tuple[int, int]] = ()) -> RankPlan:
    """The part of a rank in a schedule, which is proved.

    Raises:
        ScheduleError: the schedule cannot run; says why.
    """
    skips = list(skips)
    links = Links(schedule.num_stages, skips)
    proof, window = _proved(schedule, skips)
    queues = {pair[0]: list(queue) for pair, queue in queues_of(schedule, links).items() if pair[1] == rank}
    place = {(source, item): i for source, queue in queues.items() for i, item in enumerate(queue)}
    posted = dict.fromkeys(queues, 0)
    planned = []
    for action in schedule.actions[rank]:
        receives: list[tuple[int, Sent]] = []
        for what, stage, m in links.taken_by(action):
            source = schedule.stage_ranks[stage]
            if source == rank:
                continue
            end = place[source, (what, stage, m, action.stage)] + 1
            receives += [(source, item) for item in queues[source][posted[source] : end]]
            posted[source] = max(posted[source], end)
        given = tuple((pair[1], item) for item, pair in sends(action, schedule, links))
        planned.append(PlannedAction(action, tuple(receives), given, proof.reduced_after[action.stage] == action))
    return RankPlan(schedule, links, rank, tuple(planned), window)


def pairs_of(plan: RankPlan, tied: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """(from, to): the ranks of the pipeline that send each other something in a step, the same on all ranks.

    Args:
        tied: stages that have copies of the same parameters.
    """
    ranks, links = plan.schedule.stage_ranks, plan.links
    stages = {(stage, after) for stage, takers in enumerate(links.after) for after in takers}
    stages |= {(a, b) for group in tied for a in group for b in group}
    pairs = {(ranks[a], ranks[b]) for a, b in stages}
    return sorted((a, b) for a, b in pairs | {(b, a) for a, b in pairs} if a != b)


def require_queues(plan: RankPlan, connections: str | None) -> None:
    """The streams of a GPU go through hardware queues. With several stages on a rank a second message may be under way
    before the first is taken, and must not wait behind it there.

    Args:
        connections: the value of CUDA_DEVICE_MAX_CONNECTIONS; None: CUDA's own.

    Raises:
        ValueError: there are fewer queues than CUDA's own number.
    """
    several = max(Counter(plan.schedule.stage_ranks).values()) > 1
    if several and connections is not None and connections.isdigit() and int(connections) < HARDWARE_QUEUES:
        raise ValueError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={connections}, and this schedule has several stages on a rank, whose "
            f"messages could wait for each other for ever: unset the variable, set it to {HARDWARE_QUEUES} or more, "
            "or use a schedule with one stage on each rank (1f1b, zb-h1)"
        )


def _proved(schedule: Schedule, skips: list[tuple[int, int]]) -> tuple[Proof, int]:
    """The proof for the smallest window with which the schedule comes to an end."""
    for window in WINDOWS[:-1]:
        try:
            return prove(schedule, skips, window), window
        except ScheduleError:
            continue
    return prove(schedule, skips, WINDOWS[-1]), WINDOWS[-1]
