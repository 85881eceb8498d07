"""Ranks that torchrun starts again after one was killed; and signals to a job of torchrun's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import elastic_run
import pytest
from partita.checkpoint import checkpoints

STEPS = 9
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@contextmanager
def agent(folder: Path, *program: Any, options: list[str], log: str = "log") -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with this program; it and its ranks are gone at the end of the block."""
    command = [*TORCHRUN, *options, elastic_run.__file__, folder, *program]
    with (folder / log).open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            kill_session(process.pid)
            process.wait()


def kill_session(leader: int) -> None:
    """The agent, whose ranks are in process groups of their own, and these."""
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(folder: Path, *program: Any, ranks: int = 2, restarts: int = 0, within_s: float = 120) -> tuple[int, str]:
    """The exit code of torchrun, and what was said."""
    options = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--standalone"]
    options += ["--monitor-interval", "0.2"]
    with agent(folder, *program, options=options) as process:
        code = process.wait(within_s)
    return code, (folder / "log").read_text()


def lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    file = folder / f"steps-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def begins(folder: Path, rank: int = 0) -> list[tuple[int, int]]:
    """(step, number of ranks) of each start of a rank."""
    return [(line["begins"], line["ranks"]) for line in lines(folder, rank) if "begins" in line]


def wait_for(condition: Any, within_s: float = 90) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: Path, rank: int = 0) -> list[int]:
    return [line["step"] for line in lines(folder, rank) if "step" in line]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without any fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, said = run(folder, STEPS)
    assert code == 0, said
    return folder


def made(folder: Path, rank: int) -> dict[int, dict[str, Any]]:
    """The lines of all steps; each is the same as often as it was made, bit for bit."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines(folder, rank):
        if "step" in line:
            assert found.setdefault(line["step"], line) == line
    return found


@pytest.mark.parametrize("transport", ["auto", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_started_again_and_loses_nothing(unbroken, tmp_path, rank, transport):
    """Killed in step 6, the ranks go on from step 4: losses, samples and the final state are those of the other run."""
    code, said = run(tmp_path, STEPS, f"{rank}:6:SIGKILL", "--transport", transport, restarts=1)
    assert code == 0, said
    for one in (0, 1):
        assert begins(tmp_path, one) == [(0, 2), (4, 2)]
        assert made(tmp_path, one) == made(unbroken, one)
        assert lines(tmp_path, one)[-1] == lines(unbroken, one)[-1]


@pytest.mark.slow
def test_several_kills_in_a_row(unbroken, tmp_path):
    """Of which the second comes before the first step, where no rank has got far."""
    code, said = run(tmp_path, STEPS, "1:3:SIGKILL", "0:5:SIGKILL", "1:5:SIGKILL", "0:8:SIGKILL", restarts=4)
    assert code == 0, said
    assert lines(tmp_path, 0)[-1] == lines(unbroken, 0)[-1]
    assert made(tmp_path, 0) == made(unbroken, 0)


@pytest.mark.slow  # in one process each: test_preempted
def test_one_rank_that_gets_a_signal_ends_all(tmp_path):
    """torchrun ends with exit code 0, and the next job goes on."""
    code, said = run(tmp_path, STEPS, "1:3:SIGUSR1")
    assert code == 0, said
    assert "Traceback" not in said
    assert "SIGTERM or SIGUSR1 on another rank: saved" in said
    assert [found.manifest.step for found in checkpoints(tmp_path / "saved")] == [3, 2]
    code, said = run(tmp_path, 4, ranks=1)
    assert code == 0, said
    assert begins(tmp_path) == [(0, 2), (3, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "torch"])
def test_sigterm_to_torchrun(tmp_path, transport):
    """It tells its ranks and gives them 30 s."""
    options = ["--nproc-per-node", "2", "--standalone"]
    with agent(tmp_path, 100_000, "--pace", 0.01, "--transport", transport, options=options) as process:
        wait_for(lambda: len(steps(tmp_path)) > 3)
        process.send_signal(signal.SIGTERM)
        process.wait(25)
    newest = checkpoints(tmp_path / "saved")[0].manifest.step
    # The step that ends the run raises, and is not in the list.
    assert [steps(tmp_path, rank)[-1] for rank in (0, 1)] == [newest - 1] * 2
    assert "rank0" not in (tmp_path / "log").read_text()
