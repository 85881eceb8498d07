"""The schedule that a config asks for: one of a family, or a file."""

from __future__ import annotations

from pathlib import Path

from partita.pipeline.families import NAMES, by_name
from partita.pipeline.schedule import Schedule, ScheduleError
from partita.pipeline.text import from_text


def placement(wish: str, num_ranks: int, chunks: int | None) -> tuple[int, ...]:
    """The rank of each stage, which does not depend on the number of micro-batches.

    Args:
        wish: the name of a family, or the path of a file.
        num_ranks: of one pipeline.
        chunks: stages per rank; None: as many as the family or the file has.

    Raises:
        ScheduleError: there is no such schedule, or it is of other ranks; says what there is.
    """
    if wish in NAMES:
        return by_name(wish, num_ranks, 2 * num_ranks, chunks).stage_ranks
    return _of_file(wish, num_ranks, chunks).stage_ranks


def schedule_for(wish: str, num_ranks: int, micro_batches: int, chunks: int | None) -> Schedule:
    """The schedule of a step; the arguments are those of `placement`.

    Raises:
        ScheduleError: it is not there, or not for so many micro-batches or for training.
    """
    if wish in NAMES:
        schedule = by_name(wish, num_ranks, micro_batches, chunks)
    else:
        schedule = _of_file(wish, num_ranks, chunks)
        if schedule.micro_batches != micro_batches:
            raise ScheduleError(
                f"'{wish}' is a schedule of {schedule.micro_batches} micro-batches, and gradient_accumulation_steps = "
                f"{micro_batches}: make them equal"
            )
    if schedule.is_forward_only:
        raise ScheduleError(f"pipeline.schedule: '{wish}' has no backwards, so nothing would be trained")
    return schedule


def _of_file(path: str, num_ranks: int, chunks: int | None) -> Schedule:
    if not Path(path).is_file():
        try:
            by_name(path, num_ranks, 2 * num_ranks)
        except ScheduleError as error:
            raise ScheduleError(f"pipeline.schedule: {error}; nor is there such a file") from None
    try:
        schedule = from_text(Path(path).read_text())
    except UnicodeDecodeError:
        raise ScheduleError(f"pipeline.schedule: '{path}' is no text") from None
    except ScheduleError as error:
        raise ScheduleError(f"pipeline.schedule: '{path}': {error}") from None
    if schedule.num_ranks != num_ranks:
        raise ScheduleError(
            f"pipeline.schedule: '{path}' is a schedule of {schedule.num_ranks} ranks, and PipelineModule has "
            f"num_stages = {num_ranks}: make them equal"
        )
    if chunks is not None and schedule.num_stages != chunks * num_ranks:
        raise ScheduleError(
            f"pipeline.chunks = {chunks}, and '{path}' has {schedule.num_stages} stages on {num_ranks} ranks: leave "
            "chunks out"
        )
    return schedule
