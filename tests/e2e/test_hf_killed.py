"""Ranks of a Trainer are killed amid saves and rotation: the next run goes on from a whole checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_subjects import SUBJECTS, Subject

pytest.importorskip("transformers")

HARNESS = Path(__file__).parents[1] / "harness"
STEPS = 5
ENDS_WITHIN_S = 30  # a rank whose peer is dead


class Program:
    """The process that forks the jobs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, subject: Subject, folder: Path, world_size: int, limit: int, **more: Any) -> dict[str, Any]:
        """A job that goes on from the last checkpoint in the folder; `fatal`: the effect at which `killed` ranks end."""
        parts = {name: getattr(subject, name) for name in ("kind", "stage", "transport")}
        request = {"subject": parts, "folder": str(folder), "world_size": world_size, "limit": limit, "steps": STEPS}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"fatal": None, "killed": []} | more) + "\n")
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


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_after_kills_at_any_moment_of_its_saves(program, tmp_path, subject, world_size, limit):
    """C2: each job dies some effects on files later in its saves than the one before, until one comes to the end."""
    whole = program.run(subject, tmp_path / "whole", world_size, limit)
    assert whole["codes"] == [0] * world_size, whole["errors"]
    effects = [result["effects"] for result in whole["results"]]
    per_save = effects[0] // STEPS
    assert per_save > 5
    folder = tmp_path / "killed"
    folder.mkdir()
    began = []
    for fatal in range(per_save + 3, 2 * per_save + 4, max(1, per_save // 12)):
        rank = fatal % world_size if min(effects) >= 2 * fatal else 0
        job = program.run(subject, folder, world_size, limit, fatal=fatal, killed=[rank])
        if job["codes"] == [0] * world_size:
            break
        assert job["codes"][rank] == -9, job["errors"]
        assert max(job["late"]) < ENDS_WITHIN_S
        began.append(job)
    print(began)
    last = program.run(subject, folder, world_size, limit)
    assert last["codes"] == [0] * world_size, last["errors"]
    assert [result["loss"] for result in last["results"]] == [result["loss"] for result in whole["results"]]
    assert [result["sums"] for result in last["results"]] == [result["sums"] for result in whole["results"]]
    assert names_in(folder) == names_in(tmp_path / "whole")
