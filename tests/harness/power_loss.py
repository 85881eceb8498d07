"""What a power failure may leave of a folder: computed from the log of fault_shim.c, the calls that changed it.

Bytes are safe after an fsync of their file, names after an fsync of their folder. What is not safe may be there or not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Change = tuple[str, ...]  # ("create", path), ("rename", old, new), ("exchange", first, second)


@dataclass
class Unsafe:
    """What is not safe after the calls of a log.

    files: whose bytes are not. names: folder -> changes of its names that are not, in their order. violations: calls
    that came too early, in words.
    """

    files: set[Path] = field(default_factory=set)
    names: dict[Path, list[Change]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


def unsafe_after(log: str, root: Path) -> Unsafe:
    """Reads a log; `root` is the folder of checkpoints, whose visible names are promises."""
    unsafe = Unsafe()
    for line in log.splitlines():
        call, outcome, first, second = line.split("\t")
        if outcome == "ok":
            _follow(unsafe, root, call, Path(first), Path(second))
    return unsafe


def outcomes(tree: Path, copy: Path, unsafe: Unsafe, before: dict[str, bytes]) -> Iterator[str]:
    """Makes `copy` what a power failure may leave of `tree`, one way after the other, and says each in words.

    In all ways the unsafe bytes are lost: zeros are there in their place. In one way all names are there; in each of
    the others the last changes of one folder's names have not happened, or one change that no later one builds upon.

    Args:
        before: name -> content of the files right in `tree`, before anything was replaced.
    """
    ways: list[tuple[str, list[Change]]] = [("all names are there", [])]
    for folder, changes in unsafe.names.items():
        for count in range(1, len(changes) + 1):
            ways.append((f"the last {count} changes of names in {folder.name} are lost", changes[-count:]))
        for number, change in enumerate(changes[:-1], 1):
            if not any(set(change[1:]) & set(later[1:]) for later in changes[number:]):
                ways.append((f"{change} alone is lost", [change]))
    for words, lost in ways:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tree, copy, symlinks=True)
        for path in unsafe.files:
            target = copy / path.relative_to(tree)
            if target.is_file():
                target.write_bytes(bytes(target.stat().st_size))
        for change in reversed(lost):
            _undo(copy, tree, change, before)
        yield words


def _follow(unsafe: Unsafe, root: Path, call: str, first: Path, second: Path) -> None:
    if call == "fsync":
        unsafe.files.discard(first)
        unsafe.names.pop(first, None)
    elif call in ("write", "truncate", "allocate"):
        unsafe.files.add(first)
    elif call == "link":
        unsafe.names.setdefault(second.parent, []).append(("create", str(second)))
    elif call in ("create", "mkdir"):
        if call == "create":
            unsafe.files.add(first)
        unsafe.names.setdefault(first.parent, []).append(("create", str(first)))
    elif call in ("rename", "exchange"):
        _check_visible(unsafe, root, first, second)
        _move(unsafe, first, second, both=call == "exchange")
        unsafe.names.setdefault(second.parent, []).append((call, str(first), str(second)))
    elif call in ("unlink", "rmdir"):
        unsafe.files.discard(first)
        unsafe.names.pop(first, None)
        moves = [change for change in unsafe.names.get(root, []) if change[0] != "create"]
        if pending := [change for change in moves if str(first.parent) in change]:
            unsafe.violations.append(f"{first} is removed before {pending} is safe: its folder may come back")


def _check_visible(unsafe: Unsafe, root: Path, first: Path, second: Path) -> None:
    """What gets a visible name is safe, with all that is in it."""
    if second.parent != root or second.name.startswith("."):
        return
    late = [path for path in (*unsafe.files, *unsafe.names) if path == first or first in path.parents]
    if late:
        unsafe.violations.append(f"{second} becomes visible before {sorted(map(str, late))} are safe")


def _move(unsafe: Unsafe, first: Path, second: Path, *, both: bool) -> None:
    def moved(path: Path) -> Path:
        for old, new in ((first, second), (second, first))[: 2 if both else 1]:
            if path == old or old in path.parents:
                return new / path.relative_to(old)
        return path

    unsafe.files = {moved(path) for path in unsafe.files}
    unsafe.names = {
        moved(folder): [(kind, *(str(moved(Path(path))) for path in paths)) for kind, *paths in changes]
        if moved(folder) != folder
        else changes
        for folder, changes in unsafe.names.items()
    }


def _undo(copy: Path, tree: Path, change: Change, before: dict[str, bytes]) -> None:
    kind, *names = change
    first, *rest = [copy / Path(name).relative_to(tree) for name in names]
    if kind == "create":
        if first.is_dir():
            shutil.rmtree(first)
        else:
            first.unlink(missing_ok=True)
        return
    second = rest[0]
    if kind == "exchange" and os.path.lexists(first):
        between = second.with_name(".between")
        second.rename(between)
        first.rename(second)
        between.rename(first)
    elif os.path.lexists(second):
        second.rename(first)
        if second.name in before:
            second.write_bytes(before[second.name])
