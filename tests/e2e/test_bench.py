"""bench/: a benchmark that fails lets the others run, and one that has measured ends in order (F62)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In place of python and torchrun: notes how it is called. Benchmarks of one name fail.
TOOL = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


def run_all(folder: Path, fails: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """bench/run.sh in a copy of the tree's `bench/`, with tools that measure nothing; and what it called."""
    (folder / "bin").mkdir()
    (folder / "bench").mkdir()
    (folder / "bench" / "run.sh").write_text((ROOT / "bench" / "run.sh").read_text())
    for name in ("python", "torchrun"):
        (folder / "bin" / name).write_text(TOOL)
        (folder / "bin" / name).chmod(0o755)
    calls = folder / "calls"
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
    done = subprocess.run(
        ["sh", str(folder / "bench" / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("arguments", [[], ["quick"]], ids=["all", "quick"])
def test_a_benchmark_that_fails_lets_the_others_run_and_is_named_at_the_end(tmp_path, arguments):
    """F62: make stopped in the middle, at a run whose figures were all printed."""
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    whole, expected = run_all(tmp_path / "whole", "no benchmark", *arguments)
    broken, calls = run_all(tmp_path / "broken", "step_time.py --dtype", *arguments)
    assert whole.returncode == 0 and broken.returncode == 1
    assert "failed" not in whole.stdout + whole.stderr
    assert calls == expected
    assert broken.stderr.splitlines()[-1] == "failed: step_time_fp32 step_time_bf16"


def test_every_benchmark_writes_a_file_of_its_own(tmp_path):
    _, calls = run_all(tmp_path, "no benchmark")
    files = [call.split("json ")[1].split()[0] for call in calls]
    assert len(set(files)) == len(calls) > 10
    assert all(file.startswith("bench/results/") and (ROOT / file).parent.is_dir() for file in files)


def test_an_unknown_part_is_refused(tmp_path):
    done, calls = run_all(tmp_path, "no benchmark", "fast")
    assert done.returncode == 2 and "usage" in done.stderr and not calls


FINISHES = """
import atexit, sys
sys.path.insert(0, {peers!r})
from environment import Ranks
import torch
from torch.nn.parallel import DistributedDataParallel

ranks = Ranks()
sys.stdout = open(f"{{sys.argv[1]}}/rank{{ranks.rank}}", "w")  # a pipe of two writers mixes within a line
atexit.register(print, "Python ends")
model = DistributedDataParallel(torch.nn.Linear(2, 2))  # its reducer keeps the process group alive
model(torch.ones(1, 2)).sum().backward()
print("mean", ranks.mean(ranks.rank))
ranks.finish()
"""


def test_ranks_end_before_a_thread_of_gloo_can_meet_the_end_of_python(tmp_path, python):
    """F62: such a thread aborts the process, now and then. What a rank had still buffered is in its file."""
    (tmp_path / "program.py").write_text(FINISHES.format(peers=str(ROOT / "bench" / "peers")))
    job = python.torchrun("--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*job, str(tmp_path / "program.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["mean 0.5\n"] * 2
