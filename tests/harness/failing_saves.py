"""Saves of real engines on a disk that fails or is full, and what is told and left: functions of ranks.

`try_faults` runs below fault_shim.c (LD_PRELOAD).
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from killed_saves import hidden
from partita.checkpoint import CheckpointError, checkpoints, find, prune, verify
from resumed import digest_of, engine_for, take_steps, whole_state

NONE, FAIL, FAIL_FROM_HERE, SHORT = range(4)  # of fault_shim.c
SAME = "same"  # the tag that is saved again and again
PAGE = 4096
LATEST = "latest"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", LATEST)  # as they get their room


@dataclass(frozen=True)
class Fault:
    """What happens to one call of one rank. number: of the call, from 1. kind: see fault_shim.c. same: saves a tag that
    is there already."""

    rank: int
    number: int = 0
    kind: int = NONE
    error: int = 0
    same: bool = True


@dataclass
class Outcome:
    """What a case came to.

    of: the case. said: the error; "": none. calls: (name, "ok" or "failed", path) of the rank with the fault, about in
    their order: a rank writes with two threads. there: tag -> step, before the save and after it. step, latest: the one
    that was saved, the one of the latest checkpoint. left: hidden names after the save. wrong: what was not right.
    """

    of: Any
    said: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    there: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    step: int = 0
    latest: int = 0
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Run:
    """An engine that trains and saves into a folder, and another one that loads what is there and is compared."""

    def __init__(self, folder: str, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.engine, self._reader = (engine_for(config, seed) for seed in (1, 2))
        self._digests: dict[int, str] = {}
        self.rank = self.engine.global_rank

    def __enter__(self) -> Run:
        self.step()
        self.save("before")
        self.step()
        self.save(SAME)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.destroy()
        self._reader.destroy()

    def step(self) -> int:
        take_steps(self.engine, 1)
        self._digests[self.engine.global_steps] = digest_of(whole_state(self.engine, "AdamW"))
        return int(self.engine.global_steps)

    def save(self, tag: str) -> str:
        """What the error says; "": there is none."""
        try:
            assert self.engine.save_checkpoint(self.folder, tag) == self.folder / tag
            self.engine.wait_for_save()
        except CheckpointError as error:
            return str(error)
        return ""

    def there(self) -> dict[str, int]:
        """Tag -> step of all checkpoints, as rank 0 sees them."""
        return dict(self._of_rank_0(lambda: {one.tag: one.manifest.step for one in checkpoints(self.folder)}))

    def latest(self) -> int:
        """The step of the latest checkpoint."""
        return int(self._of_rank_0(lambda: find(self.folder, None).manifest.step))

    def left(self) -> list[str]:
        """Hidden names in the folder, as rank 0 sees them."""
        return list(self._of_rank_0(lambda: hidden(self.folder)))

    def unsound(self, *tags: str) -> list[str]:
        """What of all checkpoints has not the bytes that it should have; which of some of them (else of all) has not
        the state of its step."""
        wrong: list[str] = self._of_rank_0(
            lambda: [c.problem for one in checkpoints(self.folder) for c in verify(one.path, one.manifest) if c.problem]
        )
        there = self.there()
        for tag in tags or sorted(there):
            self._reader.load_checkpoint(self.folder, tag)
            loaded = (self._reader.global_steps, digest_of(whole_state(self._reader, "AdamW")))
            if loaded != (there[tag], self._digests[there[tag]]):
                wrong.append(f"'{tag}' has not the state of step {there[tag]}")
        return wrong

    def goes_on(self) -> list[str]:
        """What is wrong with the next step and its save."""
        step = self.step()
        wrong = [f"the next save says: {said}"] if (said := self.save(SAME)) else []
        if self.there().get(SAME) != step or self.latest() != step:
            wrong.append(f"the next save leads to {self.there()}, latest {self.latest()}, at step {step}")
        if left := self.left():
            wrong.append(f"the next save leaves {left}")
        wrong += self.unsound(SAME)
        self._of_rank_0(lambda: prune(self.folder, 2))
        return wrong

    def _of_rank_0(self, look: Callable[[], Any]) -> Any:
        """All ranks wait for it, so that nobody changes the folder meanwhile."""
        seen = [look() if self.rank == 0 else None]
        dist.broadcast_object_list(seen, 0)
        return seen[0]


# -- faults


def try_faults(folder: str, config: dict[str, Any], logs: str, faults: list[Fault]) -> list[Outcome]:
    """A save with each of the faults."""
    with Run(folder, config) as run:
        return [_try(run, Path(logs, f"log{run.rank}"), fault) for fault in faults]


def _try(run: Run, log: Path, fault: Fault) -> Outcome:
    outcome = Outcome(of=fault, step=run.step())
    before = run.there()
    log.unlink(missing_ok=True)
    tag = SAME if fault.same else f"new{outcome.step}"
    _arm(run.folder, fault if run.rank == fault.rank else Fault(run.rank), log)
    outcome.said = run.save(tag)
    _disarm()
    if run.rank == fault.rank:
        lines = [line.split("\t") for line in log.read_text().splitlines()]
        outcome.calls = [(call, how, path) for call, how, path, _ in lines]
    outcome.there = (before, run.there())
    outcome.latest, outcome.left = run.latest(), run.left()
    outcome.wrong = run.unsound() + run.goes_on()
    return outcome


def _arm(folder: Path, fault: Fault, log: Path) -> None:
    shim = ctypes.CDLL(None)
    shim.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_char_p]
    shim.fault_arm(os.fsencode(folder), fault.number, fault.kind, fault.error, 0, os.fsencode(log))


def _disarm() -> None:
    ctypes.CDLL(None).fault_arm(None, 0, NONE, 0, 0, None)


# -- no room


def fill_disk(folder: str, config: dict[str, Any]) -> list[Outcome]:
    """Saves of a tag that is there and of a new one, on a disk with room for no file, for the first one, the first two,
    and so on. `of`: (the name of the first file without room, the tag)."""
    found = []
    with Run(folder, config) as run:
        room = 0
        for name in (*FILES, ""):
            for tag in (SAME, "new"):
                found.append(_spoilt(run, (name, tag), tag, partial(_filled, run, room)))
            if name:
                room += -(-(run.folder / SAME / name).stat().st_size // PAGE) if name != LATEST else 1
    return found


def limit_files(folder: str, config: dict[str, Any], limits: list[tuple[int, int]]) -> list[Outcome]:
    """Saves, with files of at most so many bytes on one rank. `of`: (rank, bytes)."""
    with Run(folder, config) as run:
        return [_spoilt(run, limit, SAME, partial(_limited, run, *limit)) for limit in limits]


def _spoilt(run: Run, case: Any, tag: str, spoil: Callable[[], Callable[[], object]]) -> Outcome:
    """A save between what spoils it and what mends that."""
    outcome = Outcome(of=case, step=run.step())
    before, bits = run.there(), _bits(run.folder)
    mend = spoil()
    outcome.said = run.save(tag)
    dist.barrier()  # rank 0 has discarded what it has written
    if outcome.said and _bits(run.folder) != bits:
        outcome.wrong.append(f"the folder is touched: {sorted(_bits(run.folder))}")
    mend()
    outcome.there, outcome.latest = (before, run.there()), run.latest()
    outcome.wrong += run.unsound() + run.goes_on()
    return outcome


def _filled(run: Run, pages: int) -> Callable[[], object]:
    """Fills the disk, on which the folder's parent is, but for so many pages."""
    filler = run.folder.parent / "filler"
    if run.rank == 0:
        status = os.statvfs(run.folder)
        with filler.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize // PAGE - pages) * PAGE)
    dist.barrier()
    return lambda: filler.unlink(missing_ok=True)


def _limited(run: Run, rank: int, size: int) -> Callable[[], object]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    dist.barrier()
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _bits(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything there: path -> (inode, mode, time of the last change in ns, bytes)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, status.st_mtime_ns, data)
    return found
