"""Ranks of a Trainer are killed amid saves and rotation: the next run goes on from a whole checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_subjects import Subject, on_ranks

pytest.importorskip("transformers")
get_last_checkpoint = pytest.importorskip("transformers.trainer_utils").get_last_checkpoint

HARNESS = Path(__file__).parents[1] / "harness"
STEPS = 5
ENDS_WITHIN_S = 30  # a rank whose peer is dead


class Program:
    """The process that forks the jobs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, subject: Subject, folder: Path, world_size: int, **more: Any) -> dict[str, Any]:
        """A job that goes on from the last checkpoint in the folder.

        Args:
            more: `fatal`, by rank the effect on files before which it is killed; None: none.
        """
        parts = {name: getattr(subject, name) for name in ("kind", "stage", "transport")}
        request = {"subject": parts, "folder": str(folder), "world_size": world_size, "limit": 1, "steps": STEPS}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"fatal": [None] * world_size} | more) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    command = [sys.executable, str(HARNESS / "hf_killed.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Program(process)
        process.stdin.close()  # type: ignore[union-attr]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@on_ranks(1, 2)
def test_a_run_goes_on_after_kills_at_any_moment_of_its_saves(program, tmp_path, subject, world_size):
    """C2: each job dies some effects on files later in a save, or in the rotation after it, than the one before."""
    folder = tmp_path / "killed"
    for place in (folder, tmp_path / "whole"):
        place.mkdir()
    whole = program.run(subject, tmp_path / "whole", world_size)
    assert whole["codes"] == [0] * world_size, whole["errors"]
    per_save = [result["effects"] // STEPS for result in whole["results"]]
    assert min(per_save) >= 2
    assert per_save[0] > 10
    begins = []
    # The first job gets beyond its first save, and no later one does.
    for n, part in enumerate([1.1, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]):
        killed = [[0], [world_size - 1], list(range(world_size))][n % 3]
        fatal = [max(1, round(part * count)) if rank in killed else None for rank, count in enumerate(per_save)]
        job = program.run(subject, folder, world_size, fatal=fatal)
        assert -9 in job["codes"], job["errors"]
        assert 0 not in job["codes"]
        assert max(job["late"]) < ENDS_WITHIN_S  # the other ranks end, too
        begins.append(int(newest.rpartition("-")[2]) if (newest := get_last_checkpoint(str(folder))) else 0)
    assert 1 <= begins[0] <= begins[-1] < STEPS
    last = program.run(subject, folder, world_size)
    assert last["codes"] == [0] * world_size, last["errors"]
    for actual, expected in zip(last["results"], whole["results"], strict=True):
        assert actual["began"] == begins[-1]
        assert actual["loss"] == expected["loss"]
        assert actual["sums"] == expected["sums"]
    assert names_in(folder) == names_in(tmp_path / "whole")
