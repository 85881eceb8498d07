"""docs/migration.md: each diff fits the program above it, has at most ten lines, and both end with the same losses."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, blocks

PAGE = "docs/migration.md"
NEEDS = {"Accelerate": "accelerate", "Trainer": "transformers", "Lightning": "lightning"}
ARGUMENTS = {"DeepSpeed": ["--deepspeed", "--deepspeed_config", "ds_config.json"]}


@dataclass(frozen=True)
class Migration:
    """From a library: a program and a diff of it, which is the n-th one of the section."""

    library: str
    number: int
    before: str
    diff: str


def migrations() -> list[Migration]:
    lines = (ROOT / PAGE).read_text().splitlines()
    found: list[Migration] = []
    program = ""
    for block in blocks(PAGE):
        if block.language == "python":
            program = block.text
        elif block.text.startswith("--- a/train.py"):
            heading = next(line for line in reversed(lines[: block.line]) if line.startswith("## From "))
            library = heading.removeprefix("## From ")
            number = sum(one.library == library for one in found)
            found.append(Migration(library, number, program, block.text))
    return found


def named(one: Migration) -> Any:
    marks = () if one.library == "DistributedDataParallel" else pytest.mark.slow
    return pytest.param(one, id=f"{one.library} {one.number}", marks=marks)


ALL = migrations()


def applied(one: Migration, folder: Path) -> str:
    """The program after the diff."""
    (folder / "train.py").write_text(one.before)
    command = ["git", "apply", "--unidiff-zero", "-"]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(command, cwd=folder, env=env, input=one.diff, text=True, check=True)
    return (folder / "train.py").read_text()


def test_every_library_has_a_diff():
    assert {one.library for one in ALL} == {"DeepSpeed", "DistributedDataParallel", "FSDP2", *NEEDS}


@pytest.mark.parametrize("one", [pytest.param(one, id=f"{one.library} {one.number}") for one in ALL])
def test_a_diff_has_at_most_ten_lines_and_makes_a_program(one, tmp_path):
    changed = [line for line in one.diff.splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
    assert 0 < len(changed) <= 10
    after = applied(one, tmp_path)
    compile(after, "train.py", "exec")
    assert "partita" in after and "partita" not in one.before


def losses(command: list[str], folder: Path) -> dict[str, float]:
    """What each rank says last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    found = dict(re.findall(r"rank (\d): loss ([\d.]+)", done.stdout))
    assert done.returncode == 0 and set(found) == {"0", "1"}, done.stdout + done.stderr
    return {rank: float(loss) for rank, loss in found.items()}


@pytest.mark.parametrize("one", [named(one) for one in ALL])
def test_both_programs_end_with_the_same_losses(one, tmp_path, python):
    """A program of DeepSpeed's by `partita run`, and by DeepSpeed where it is installed."""
    pytest.importorskip(NEEDS.get(one.library, "torch"))
    for block in blocks(PAGE):
        if block.language == "json":
            (tmp_path / block.test.removeprefix("name ")).write_text(block.text)
    after = applied(one, tmp_path)
    arguments = ARGUMENTS.get(one.library, [])

    def run(program: str, *, aliased: bool = False) -> dict[str, float]:
        (tmp_path / "train.py").write_text(program)
        ranks = [*python.command, "-m", "partita", "run"] if aliased else None
        launcher = python.torchrun("--standalone", "--nproc-per-node", "2", ranks=ranks)
        return losses([*launcher, "train.py", *arguments], tmp_path)

    migrated = run(after)
    assert migrated == pytest.approx(run(one.before, aliased=one.library == "DeepSpeed"), rel=1e-4)
    if one.library == "DeepSpeed" and importlib.util.find_spec("deepspeed") is not None:
        assert migrated == pytest.approx(run(one.before), rel=0.01)  # in bf16
    assert len(set(migrated.values())) == 2 or one.library == "Trainer"
