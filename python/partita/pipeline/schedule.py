"""A pipeline schedule as data: what each rank does, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class ScheduleError(ValueError):
    """A schedule that cannot be made, read, or run."""


class Action(NamedTuple):
    """One piece of work of a rank: a stage with a micro-batch.

    kind: F is the forward, B the backward. A backward may be split in I, the gradients of the stage's inputs, and W,
    those of its weights.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """The actions of one step.

    Attributes:
        stage_ranks: the rank of each stage. A model's layers go through the stages in their order.
        micro_batches: in one step.
        actions: of each rank, in their order.
    """

    stage_ranks: tuple[int, ...]
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if not self.actions or not self.stage_ranks:
            raise ScheduleError("a schedule has at least one rank and one stage")
        if self.micro_batches < 1:
            raise ScheduleError(f"micro_batches = {self.micro_batches}: there is at least one")
        for stage, rank in enumerate(self.stage_ranks):
            if not 0 <= rank < self.num_ranks:
                raise ScheduleError(f"stage {stage} is on rank {rank}: there are the ranks 0 to {self.num_ranks - 1}")

    @property
    def num_ranks(self) -> int:
        """Of one pipeline."""
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        """Of the model; a rank may have several."""
        return len(self.stage_ranks)

    @cached_property
    def is_forward_only(self) -> bool:
        """Whether nothing is trained: no rank has a backward."""
        return all(action.kind == "F" for actions in self.actions for action in actions)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank has, in the model's order."""
        return [stage for stage, its_rank in enumerate(self.stage_ranks) if its_rank == rank]


# What actions make and take: the output of a stage's forward ("F"), the gradients of its inputs ("B", of a B or an I),
# what an I leaves to its W ("I"); of a stage and a micro-batch.
Made = tuple[str, int, int]


class Links:
    """What actions take from each other.

    Args:
        skips: (from, to), from < to: the later stage takes the output of the earlier, as of skip connections. Beside
            the chain, in which each stage takes the output of the one before.

    Attributes:
        before: the stages whose outputs a stage takes, by stage.
        after: the stages that take a stage's output, by stage.

    Raises:
        ScheduleError: there are no such stages, or a skip leads backwards.
    """

    def __init__(self, num_stages: int, skips: Iterable[tuple[int, int]] = ()) -> None:
        chain = {(stage, stage + 1) for stage in range(num_stages - 1)}
        edges = sorted(chain | set(skips))
        for a, b in edges:
            if not 0 <= a < b < num_stages:
                raise ScheduleError(
                    f"a skip from stage {a} to stage {b}: skips lead forwards, among the stages 0 to {num_stages - 1}"
                )
        self.before = [[a for a, b in edges if b == stage] for stage in range(num_stages)]
        self.after = [[b for a, b in edges if a == stage] for stage in range(num_stages)]

    def taken_by(self, action: Action) -> list[Made]:
        """What must be there before an action."""
        kind, stage, m = action
        if kind == "F":
            return [("F", before, m) for before in self.before[stage]]
        if kind == "W":
            return [("I", stage, m)]
        return [("F", stage, m), *(("B", after, m) for after in self.after[stage])]

    def takers(self, what: str, stage: int) -> list[int]:
        """The stages that take a stage's output ("F") or the gradients of its inputs ("B")."""
        return self.after[stage] if what == "F" else self.before[stage]


def made_by(action: Action) -> list[Made]:
    """What is there after an action; what others may take comes last."""
    kind, stage, m = action
    if kind == "I":
        return [("I", stage, m), ("B", stage, m)]
    return [] if kind == "W" else [(kind, stage, m)]


def looped(num_ranks: int, chunks: int) -> tuple[int, ...]:
    """Stages go round the ranks: rank 0 has the stages 0, num_ranks, 2 num_ranks, ..."""
    return tuple(range(num_ranks)) * chunks


def v_shaped(num_ranks: int) -> tuple[int, ...]:
    """Two stages per rank, down the ranks and back: rank 0 has the first stage and the last."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def all_actions(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """(rank, action), in the order of each rank."""
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            yield rank, action


def schedule_of(stage_ranks: Sequence[int], micro_batches: int, orders: Sequence[Sequence[Action]]) -> Schedule:
    """Of orders that a generator has made."""
    return Schedule(tuple(stage_ranks), micro_batches, tuple(tuple(order) for order in orders))
