"""Schedules that are written down action by action: GPipe, 1F1B, interleaved, breadth-first, DualPipeV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

from partita.pipeline.schedule import Action, Kind, Schedule, ScheduleError, looped, schedule_of, v_shaped


def forward_only(num_ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """For evaluation: every micro-batch through every stage."""
    stage_ranks = looped(num_ranks, chunks)
    orders = [
        [Action("F", s, m) for s in range(rank, len(stage_ranks), num_ranks) for m in range(micro_batches)]
        for rank in range(num_ranks)
    ]
    return schedule_of(stage_ranks, micro_batches, orders)


def forward_wave(stage_ranks: Sequence[int], micro_batches: int) -> Schedule:
    """For evaluation, wherever the stages are: micro-batches follow each other through the stages at equal distances,
    so few outputs wait."""
    ranks = 1 + max(stage_ranks)
    waves = sorted(
        (stage + m, -stage, Action("F", stage, m)) for stage in range(len(stage_ranks)) for m in range(micro_batches)
    )
    orders = [[action for *_, action in waves if stage_ranks[action.stage] == rank] for rank in range(ranks)]
    return schedule_of(stage_ranks, micro_batches, orders)


def gpipe(num_ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards.

    Idle: (P-1)/(M+P-1) of the time. Memory: M micro-batches. Source: Huang et al. 2019, arXiv:1811.06965.
    """
    return looped_breadth_first(num_ranks, micro_batches, 1)


def looped_breadth_first(num_ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Each stage of a rank takes all micro-batches before the next stage does.

    Gradients of a stage are complete as early as may be, so that their reduction overlaps with other stages. Source:
    Lamy-Poirier 2023, arXiv:2211.05953.
    """
    stage_ranks = looped(num_ranks, chunks)
    orders = []
    for rank in range(num_ranks):
        own = range(rank, len(stage_ranks), num_ranks)
        forwards = [Action("F", s, m) for s in own for m in range(micro_batches)]
        orders.append(forwards + [Action("B", s, m) for s in reversed(own) for m in range(micro_batches)])
    return schedule_of(stage_ranks, micro_batches, orders)


def one_f_one_b(num_ranks: int, micro_batches: int) -> Schedule:
    """A backward as soon as there is one, and then a forward.

    Idle: (P-1)/(M+P-1) of the time, as with GPipe. Memory: P - rank micro-batches. Source: Narayanan et al. 2019,
    PipeDream, and 2021, arXiv:2104.04473.
    """
    return schedule_of(
        looped(num_ranks, 1),
        micro_batches,
        [
            _alternating(_of("F", [rank], micro_batches), _of("B", [rank], micro_batches), num_ranks - rank - 1)
            for rank in range(num_ranks)
        ],
    )


def interleaved(num_ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """1F1B with several stages per rank, which take P micro-batches in turns.

    Idle: (P-1)/(vM+P-1) of the time. Source: Narayanan et al. 2021, arXiv:2104.04473.

    Raises:
        ScheduleError: the micro-batches do not divide into rounds of P or a little more.
    """
    rounds = max(1, micro_batches // num_ranks)
    if micro_batches % rounds:
        below = micro_batches // num_ranks * num_ranks
        raise ScheduleError(
            f"interleaved: {micro_batches} micro-batches do not divide into {rounds} equal rounds of {num_ranks} or a "
            f"few more: take {below} or {below + num_ranks}, or another multiple of {num_ranks}"
        )
    each = micro_batches // rounds
    stage_ranks = looped(num_ranks, chunks)
    orders = []
    for rank in range(num_ranks):
        own = list(range(rank, len(stage_ranks), num_ranks))
        ahead = (chunks - 1) * each + 2 * (num_ranks - rank - 1) if chunks > 1 else num_ranks - rank - 1
        backwards = _of("B", own[::-1], micro_batches, each)
        orders.append(_alternating(_of("F", own, micro_batches, each), backwards, ahead))
    return schedule_of(stage_ranks, micro_batches, orders)


def dualpipe_v(num_ranks: int, micro_batches: int) -> Schedule:
    """Two stages per rank in a V; in the middle a forward of one is beside a backward of the other.

    Source: DeepSeek 2025, github.com/deepseek-ai/DualPipe: its eight phases, with its split backwards.

    Raises:
        ScheduleError: fewer than 2P micro-batches.
    """
    if micro_batches < 2 * num_ranks:
        raise ScheduleError(
            f"dualpipe-v: {micro_batches} micro-batches are fewer than two for each of {num_ranks} ranks: take at "
            f"least {2 * num_ranks}"
        )
    return schedule_of(
        v_shaped(num_ranks), micro_batches, [_dualpipe_order(r, num_ranks, micro_batches) for r in range(num_ranks)]
    )


def _dualpipe_order(rank: int, num_ranks: int, micro_batches: int) -> list[Action]:
    stages = (rank, 2 * num_ranks - 1 - rank)
    left = num_ranks - rank - 1  # the ranks below this one
    order: list[Action] = []
    next_of = {(kind, chunk): count() for kind in "FB" for chunk in (0, 1)}
    waiting: list[Action] = []  # weight gradients, the oldest first

    def add(kind: Kind, chunk: int, split: bool = False) -> None:
        m = next(next_of[kind, chunk])
        order.append(Action("I" if split else kind, stages[chunk], m))
        if split:
            waiting.append(Action("W", stages[chunk], m))

    for _ in range(2 * left):
        add("F", 0)
    for _ in range(rank + 1):
        add("F", 0)
        add("F", 1)
    for _ in range(left):
        add("B", 1, split=True)
        order.append(waiting.pop(0))
        add("F", 1)
    for _ in range(micro_batches - 2 * num_ranks + rank + 1):
        for chunk in (0, 1):
            add("F", chunk)
            add("B", 1 - chunk)
    for _ in range(left):
        add("B", 1)
        add("F", 1)
        add("B", 0)
    # In the second half of the drain, and from then on, backwards are split: their weights fill what would be idle.
    for i in range(rank + 1):
        add("B", 1, split=2 * i >= rank + 1)
        add("B", 0, split=i >= (rank + 1) // 2)
    for _ in range(left):
        order.append(waiting.pop(0))
        add("B", 0, split=True)
    return order + waiting


def _of(kind: Kind, stages: list[int], micro_batches: int, each: int | None = None) -> Iterator[Action]:
    """The actions of a kind on stages that take `each` micro-batches in turns."""
    each = each or micro_batches
    for first in range(0, micro_batches, each):
        for stage in stages:
            yield from (Action(kind, stage, m) for m in range(first, first + each))


def _alternating(forwards: Iterator[Action], backwards: Iterator[Action], ahead: int) -> list[Action]:
    """So many forwards first, then a forward and a backward in turns."""
    order = list(islice(forwards, ahead))
    for forward, backward in zip(forwards, backwards):  # noqa: B905 (the rest of the backwards comes after it)
        order += [forward, backward]
    return list(chain(order, backwards))
