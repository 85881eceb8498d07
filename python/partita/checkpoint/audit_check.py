"""Whether an audit log is whole: which lines were changed, removed, inserted or moved. Pure but for `check_audit`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint import audit
from partita.checkpoint.audit import Line, LogKey
from partita.checkpoint.folder import Found, checkpoints
from partita.checkpoint.manifest import AuditMark
from partita.checkpoint.user_key import UserKey

_MAKES = ("saved", "imported", "encrypted")


@dataclass(frozen=True)
class Checked:
    """problems: each in one line; none: the log is whole. last: number and hash of the last line."""

    lines: list[Line]
    problems: list[str]
    last: AuditMark


def check_audit(directory: Path, key: UserKey) -> Checked:
    """Looks through the log of a folder, and at the checkpoints there.

    Raises:
        CheckpointError: there is no log, it cannot be read, or has another key.
    """
    log = audit.read_key(directory, key)
    good, problems = check_lines(audit.lines(directory), log)
    problems += _check_checkpoints(checkpoints(directory), good)
    return Checked(good, problems, good[-1].mark if good else log.last)


def check_lines(texts: Iterable[bytes], log: LogKey) -> tuple[list[Line], list[str]]:
    """The lines that are of the log and in their places, and what is wrong with the others."""
    good: list[Line] = []
    problems: list[str] = []
    foreign: list[int] = []  # places of lines that are not of the log, since the last that is
    last = audit.NO_LINE
    for place, text in enumerate(texts, 1):
        line = log.line_of(text)
        if line is None:
            foreign.append(place)
        elif line.number <= last.number:
            problems.append(f"line {place} is number {line.number}, which stood before: it was copied or moved")
        else:
            problems += _gap(foreign, last.number, line.number)
            if line.number == last.number + 1 and line.before != last.hash:
                problems.append(f"line {place} does not go with the line before it")
            foreign = []
            good.append(line)
            last = line.mark
    problems += _gap(foreign, last.number, max(last.number, log.last.number) + 1)
    by_number = {line.number: line.hash for line in good}
    if log.last.number in by_number and by_number[log.last.number] != log.last.hash:
        problems.append(f"line {log.last.number} is not the one that {audit.HEAD} has")
    return good, problems


def _gap(foreign: list[int], last: int, number: int) -> list[str]:
    """What is wrong between two numbers that should follow each other."""
    missing = number - last - 1
    if len(foreign) == missing:
        return [f"line {place} was changed" for place in foreign]
    found = [f"line {place} was inserted, or changed" for place in foreign]
    if missing > len(foreign):
        numbers = f"number {last + 1}" if missing == 1 else f"numbers {last + 1} to {number - 1}"
        found.append(f"{missing - len(foreign)} of the lines with {numbers} {'are' if missing > 1 else 'is'} missing")
    return found


def _check_checkpoints(found: Iterable[Found], good: list[Line]) -> list[str]:
    """Checkpoints whose lines are not there, and older ones under the names of newer ones."""
    problems = []
    by_number = {line.number: line for line in good}
    newest: dict[str, str] = {}
    failed = {line.checkpoint for line in good if line.what == "failed"}
    for line in good:
        if line.what in _MAKES and line.checkpoint not in failed:
            newest[line.tag] = line.checkpoint
    for one in found:
        encryption = one.manifest.encryption
        if encryption is None:
            continue
        line_of_it = by_number.get(encryption.audit.number)
        if line_of_it is None or (line_of_it.hash, line_of_it.checkpoint) != (encryption.audit.hash, encryption.id):
            problems.append(f"the line {encryption.audit.number}, by which '{one.path}' was saved, is not there")
        elif newest.get(one.tag) != encryption.id:
            problems.append(f"'{one.path}' is not the checkpoint that was saved last under this tag")
    return problems
