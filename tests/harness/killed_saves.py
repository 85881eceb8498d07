"""A job that saves over and over until it is killed, and what its folder may hold then."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import START_S, Job
from partita.checkpoint import checkpoints, find, verify
from partita.comm import CommunicationError
from resumed import config_for, digest_of, engine_for, take_steps, whole_state

RANKS = 2
SAVES = 4  # of a job at most
KILLS = 8  # jobs that go on in one folder, each from where the one before it was killed
STEPS = SAVES * (KILLS + 1)
MODES = ((0, 1), (0,), (1,))  # the ranks that are killed


def tag_of(step: int) -> str:
    """Each tag is saved twice in a row, and comes again after some steps."""
    return "abc"[step // 2 % 3]


def hidden(folder: Path) -> list[str]:
    """What saves have left, of whatever kind."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def digests_by_step(config: dict[str, Any]) -> list[str]:
    """Of the state of an unbroken run after 0, 1, ... steps."""
    engine = engine_for(config, seed=1)
    found = [digest_of(whole_state(engine, "AdamW"))]
    for _ in range(STEPS):
        take_steps(engine, 1)
        found.append(digest_of(whole_state(engine, "AdamW")))
    engine.destroy()
    return found


def save_until_killed(rank: int, report: Callable[[Any], None], folder: str, config: dict[str, Any]) -> None:
    """Goes on from the latest checkpoint, if there is one, and saves after every step. Reports (what, step, more)."""
    engine = engine_for(config, seed=1)
    if (Path(folder) / "latest").exists():
        engine.load_checkpoint(folder)
    report(("loaded", engine.global_steps, digest_of(whole_state(engine, "AdamW"))))
    try:
        for _ in range(SAVES):
            take_steps(engine, 1)
            step = engine.global_steps
            report(("saving", step, None))
            begin = time.monotonic()
            engine.save_checkpoint(folder, tag_of(step))
            engine.wait_for_save()
            seconds = time.monotonic() - begin
            # Rank 0 alone makes names in the folder, so that here nobody does.
            report(("saved", step, (seconds, hidden(Path(folder)) if rank == 0 else [])))
        while True:
            take_steps(engine, 1)
    except CommunicationError as error:
        report(("raised", engine.global_steps, str(error)))


@dataclass
class Chain:
    """Jobs in one folder, each killed and followed by the next one. `wrong` has a line for all that was not right."""

    folder: Path
    config: dict[str, Any]
    digests: list[str]
    wrong: list[str] = field(default_factory=list)
    left_behind: int = 0  # kills that left an unfinished folder
    there: dict[str, int] = field(default_factory=dict)  # tag -> step

    def kill(self, mode: tuple[int, ...], moment: float, rng: random.Random) -> None:
        """Starts a job, kills some of its ranks at a moment of a save (0: its beginning, 1: its end), and looks."""
        where = f"{mode} killed at {moment:.3f}"
        with Job(RANKS, save_until_killed, str(self.folder), self.config) as job:
            start = self._loaded(job, where)
            number = rng.randrange(2, SAVES + 1)  # the first one says how long a save takes
            seconds = [self._saved(job, where, clean=True) for _ in range(number - 1)]
            self._next(job, 0, "saving")
            time.sleep(moment * statistics.median(seconds))
            for rank in rng.sample(mode, len(mode)):
                os.kill(job.processes[rank].pid, signal.SIGKILL)
            said = [
                message for rank in range(RANKS) for message in self._last_words(job, rank, rank not in mode, where)
            ]
        done = max([start + number - 1, *(step for what, step, _ in said if what == "saved")])
        self._look(where, done, survivor=0 not in mode)

    def go_on(self) -> None:
        """A job that is left alone for one save."""
        with Job(RANKS, save_until_killed, str(self.folder), self.config) as job:
            self._loaded(job, "at the end")
            self._saved(job, "at the end", clean=True)

    def _loaded(self, job: Job, where: str) -> int:
        """Every rank has all the bits of the step that the checkpoint claims. Returns the step."""
        latest = find(self.folder, None).manifest.step if self.there else 0
        for rank in range(RANKS):
            step, digest = self._next(job, rank, "loaded")
            if step != latest:
                self.wrong.append(f"before {where}: rank {rank} loaded step {step}, and the latest is {latest}")
            if digest != self.digests[step]:
                self.wrong.append(f"before {where}: what rank {rank} loaded is not the state of step {step}")
        return int(latest)

    def _saved(self, job: Job, where: str, clean: bool) -> float:
        self._next(job, 0, "saving")
        step, (seconds, left) = self._next(job, 0, "saved")
        if left and clean:
            self.wrong.append(f"before {where}: the save of step {step} leaves {left}")
        self.there[tag_of(step)] = step
        return float(seconds)

    def _next(self, job: Job, rank: int, what: str) -> tuple[int, Any]:
        said, step, more = job.report(rank)
        assert said == what, f"rank {rank} says {said} {step} {more} where {what} was awaited"
        return step, more

    def _last_words(self, job: Job, rank: int, survives: bool, where: str) -> list[tuple[str, int, Any]]:
        """What a rank still says. One that is not killed must say that another one is gone, and end."""
        said: list[tuple[str, int, Any]] = []
        try:
            while job.reports[rank].poll(START_S):
                said.append(job.reports[rank].recv())
        except (EOFError, ConnectionError):
            pass
        if survives and not (said and said[-1][0] == "raised" and job.exits_cleanly(rank, START_S)):
            self.wrong.append(f"{where}: rank {rank} survives and says {said[-1:]}")
        return said

    def _look(self, where: str, done: int, survivor: bool) -> None:
        """Each tag has the checkpoint that it had, or the one that was being saved, and all their bytes are sound."""
        found = checkpoints(self.folder)
        there = {one.tag: one.manifest.step for one in found}
        before = self.there | {tag_of(step): step for step in range(max(self.there.values()) + 1, done + 1)}
        after = before | {tag_of(done + 1): done + 1}
        if there not in (before, after):
            self.wrong.append(f"{where}: there is {there}, and not {before} or {after}")
        if found and (latest := find(self.folder, None).manifest.step) not in (done, found[0].manifest.step):
            self.wrong.append(f"{where}: the latest is {latest} of {there}")
        for one in found:
            problems = [chunk.problem for chunk in verify(one.path, one.manifest) if chunk.problem]
            self.wrong += [f"{where}: {problem}" for problem in problems]
        left = hidden(self.folder)
        if left and survivor:
            self.wrong.append(f"{where}: rank 0 survives and leaves {left}")
        self.left_behind += bool(left)
        self.there = there


def kill_at(moments: list[float], folder: Path, config: dict[str, Any], digests: list[str], seed: int) -> Chain:
    """Kills a job at each of these moments, all ranks or one of them in turn; the jobs go on in one folder."""
    rng = random.Random(seed)
    chain = Chain(folder, config, digests)
    for i, moment in enumerate(moments):
        chain.kill(MODES[i % len(MODES)], moment, rng)
    chain.go_on()
    return chain


def config_of(stage: int, precision: str, transport: str, *, beside: bool = False) -> dict[str, Any]:
    """Of a run whose every saved byte counts. beside: it saves beside training."""
    comm = {"transport": transport, "timeout_seconds": 60}
    return config_for(RANKS, stage, precision, comm=comm, checkpoint={"async_save": beside})
