"""Schedules as text: a file of our own, and torch's CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from partita.pipeline.schedule import KINDS, Action, Kind, Schedule, ScheduleError, schedule_of

HEADER = "partita pipeline schedule 1"
_KINDS: dict[str, Kind] = {kind: kind for kind in KINDS}
_ACTION = re.compile(r"(\d{1,9})([FBIW])(\d{1,9})")
# torch writes two actions that a rank makes beside each other as one.
_PAIR = re.compile(r"\((\w+);(\w+)\)OVERLAP_F_B")


def to_text(schedule: Schedule) -> str:
    """The file: a header, the rank of each stage, the number of micro-batches, and a line of actions for each rank."""
    lines = [
        HEADER,
        f"stage ranks: {' '.join(map(str, schedule.stage_ranks))}",
        f"micro-batches: {schedule.micro_batches}",
        *(f"rank {rank}: {' '.join(map(str, actions))}" for rank, actions in enumerate(schedule.actions)),
    ]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Schedule:
    """Reads what `to_text` wrote, or torch's CSV.

    Raises:
        ScheduleError: it is neither; names the line.
    """
    lines = text.splitlines()
    if not lines or lines[0].strip() != HEADER:
        return from_csv(text)
    values: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = line.partition(":")
        if not colon or key.strip() in values:
            raise ScheduleError(f"line {number}: '{line[:60]}' should be a key that is not yet there, ':' and a value")
        values[key.strip()] = value
    ranks = len(values) - 2
    keys = ["stage ranks", "micro-batches", *(f"rank {rank}" for rank in range(ranks))]
    missing = next((key for key in keys if key not in values), None)
    if missing is not None:
        raise ScheduleError(f"there is no line '{missing}: ...' in a schedule of {max(ranks, 0)} ranks")
    orders = [_actions(values[f"rank {rank}"].split(), f"rank {rank}") for rank in range(ranks)]
    stage_ranks = _numbers(values["stage ranks"], "stage ranks")
    micro_batches = _numbers(values["micro-batches"], "micro-batches")
    if len(micro_batches) != 1:
        raise ScheduleError(f"micro-batches: '{values['micro-batches'].strip()}' is not one number")
    return schedule_of(stage_ranks, micro_batches[0], orders)


def to_csv(schedule: Schedule) -> str:
    """torch.distributed.pipelining's file of computations: a row for each rank, of cells like 2F0."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([map(str, actions) for actions in schedule.actions])
    return file.getvalue()


def from_csv(text: str) -> Schedule:
    """Reads torch's file; empty cells, in which a rank waits, are left out. The ranks of the stages, and the number of
    micro-batches, are those of the actions.

    Raises:
        ScheduleError: a cell is no computation; names the rank.
    """
    orders = []
    for rank, row in enumerate(csv.reader(io.StringIO(text))):
        cells = [cell.strip() for cell in row]
        pairs = (_PAIR.fullmatch(cell) for cell in cells)
        parts = [pair.groups() if pair else (cell,) for pair, cell in zip(pairs, cells, strict=True) if cell]
        orders.append(_actions([part for cell in parts for part in cell], f"rank {rank}"))
    found = {action.stage: rank for rank, order in enumerate(orders) for action in order}
    if sorted(found) != list(range(len(found))) or not found:
        raise ScheduleError(f"this is no schedule: it has actions of the stages {sorted(found)}")
    micro_batches = 1 + max(action.micro_batch for order in orders for action in order)
    return schedule_of([found[stage] for stage in range(len(found))], micro_batches, orders)


def _actions(words: Sequence[str], where: str) -> list[Action]:
    actions = []
    for word in words:
        match = _ACTION.fullmatch(word)
        if match is None:
            raise ScheduleError(
                f"{where}: '{word[:40]}' is no action: these are like 2F0, which is stage 2, forward "
                "(or B, I, W), micro-batch 0"
            )
        stage, letter, m = match.groups()
        actions.append(Action(_KINDS[letter], int(stage), int(m)))
    return actions


def _numbers(text: str, where: str) -> list[int]:
    words = text.split()
    wrong = next((word for word in words if not word.isdecimal() or len(word) > 9), None)
    if wrong is not None:
        raise ScheduleError(f"{where}: '{wrong[:40]}' is no number")
    return [int(word) for word in words]
