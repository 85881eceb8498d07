"""Schedules by name, and the best of all of them for given costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from partita.config import suggest
from partita.pipeline.classic import (
    dualpipe_v,
    forward_only,
    gpipe,
    interleaved,
    looped_breadth_first,
    one_f_one_b,
)
from partita.pipeline.list_schedule import list_schedule
from partita.pipeline.schedule import Schedule, ScheduleError, looped, v_shaped
from partita.pipeline.simulate import Costs, simulate
from partita.pipeline.zero_bubble import straight, v_block, v_half, v_min, zb_h1, zb_h2, zb_v

# By the number of stages that a rank has: one, any (two or more as a rule), or two in a V.
ONE: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1, "zb-h2": zb_h2}
ANY: dict[str, Callable[[int, int, int], Schedule]] = {
    "forward-only": forward_only,
    "interleaved": interleaved,
    "looped-bfs": looped_breadth_first,
}
TWO: dict[str, Callable[[int, int], Schedule]] = {
    "zb-v": zb_v,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipe-v": dualpipe_v,
}
NAMES = sorted([*ONE, *ANY, *TWO])


def by_name(name: str, num_ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """A schedule of a family.

    Args:
        name: one of `NAMES`.
        chunks: stages per rank; None: as many as the family has, or two for interleaved ones.

    Raises:
        ScheduleError: there is no such family, or it does not do this; says what it does.
    """
    if num_ranks < 1 or micro_batches < 1:
        raise ScheduleError(f"{num_ranks} ranks and {micro_batches} micro-batches: there is at least one of each")
    if name in ANY:
        default = 1 if name == "forward-only" else 2
        if chunks is not None and chunks < 1:
            raise ScheduleError(f"{name}: chunks = {chunks}: a rank has at least one stage")
        return ANY[name](num_ranks, micro_batches, default if chunks is None else chunks)
    if name not in ONE and name not in TWO:
        raise ScheduleError(f"there is no schedule '{name}'{suggest(name, NAMES)}")
    has = 1 if name in ONE else 2
    if chunks not in (None, has):
        raise ScheduleError(f"{name} has {has} stage{'s' * (has - 1)} per rank, and chunks = {chunks} was given")
    return (ONE | TWO)[name](num_ranks, micro_batches)


def auto(num_ranks: int, micro_batches: int, costs: Costs, memory_bytes: Sequence[float]) -> Schedule:
    """The fastest schedule under measured costs that fits the memory: of all families, and of list schedules for
    these costs.

    Args:
        costs: of all stages; their number divides by that of the ranks.
        memory_bytes: of each rank, for all that `Costs` has.

    Raises:
        ScheduleError: nothing fits; says what the most frugal schedule needs.
    """
    chunks, rest = divmod(len(costs.forward), num_ranks)
    if rest or not chunks or len(memory_bytes) != num_ranks:
        raise ScheduleError(
            f"{len(costs.forward)} stages and memory for {len(memory_bytes)} ranks: each of {num_ranks} ranks has the "
            "same number of stages"
        )
    best, best_time = None, float("inf")
    least: tuple[int, ...] | None = None
    for schedule in _candidates(num_ranks, micro_batches, chunks, costs, memory_bytes):
        run = simulate(schedule, costs)
        if least is None or max(run.peak_bytes) < max(least):
            least = run.peak_bytes
        fits = all(peak <= limit for peak, limit in zip(run.peak_bytes, memory_bytes, strict=True))
        if fits and run.time < best_time:
            best, best_time = schedule, run.time
    if best is None:
        raise ScheduleError(f"no schedule fits {list(memory_bytes)} bytes: the most frugal needs {list(least or ())}")
    return best


def _candidates(
    num_ranks: int, micro_batches: int, chunks: int, costs: Costs, memory_bytes: Sequence[float]
) -> Iterator[Schedule]:
    names = [*(ONE if chunks == 1 else []), *ANY, *(TWO if chunks == 2 else [])]
    for name in names:
        if name != "forward-only":
            try:
                yield by_name(name, num_ranks, micro_batches, chunks if name in ANY else None)
            except ScheduleError:
                continue  # not for so many micro-batches
    placements = [looped(num_ranks, chunks), *([v_shaped(num_ranks)] if chunks == 2 else [])]
    blocks = [straight(num_ranks, 1, 2), straight(num_ranks, 2, 4)] if chunks == 1 else []
    blocks += [v_block(num_ranks, s) for s in ((4, 2, 4, 2), (2, 1, 2, 1), (1, 1, 1, 1))] if chunks == 2 else []
    tried = [(placement, None) for placement in placements]
    for stage_ranks, orders in [
        *tried,
        *((b.stage_ranks, b.orders(micro_batches, costs.activation_bytes)) for b in blocks),
    ]:
        free = list(memory_bytes)
        for stage, rank in enumerate(stage_ranks):
            free[rank] -= costs.state_bytes[stage]
        for rank in range(num_ranks):  # a backward is given a gradient
            own = (stage for stage, its_rank in enumerate(stage_ranks) if its_rank == rank)
            free[rank] -= max(costs.output_bytes[stage] for stage in own)
        try:
            yield list_schedule(stage_ranks, micro_batches, costs, free, orders)
        except ScheduleError:
            continue  # not with so little memory
