"""Ranks that torchrun starts again after one was killed, also fewer of them; and signals to a job of torchrun's."""

from __future__ import annotations

import json
import os
import signal
import socket
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
from resumed import BATCH

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


def samples(folder: Path, ranks: int) -> dict[int, list[int]]:
    """Those of all ranks by step, as the last start that made the step has seen them."""
    found: dict[int, dict[int, list[int]]] = {}
    for rank in range(ranks):
        for line in lines(folder, rank):
            if "step" in line:
                found.setdefault(line["step"], {})[rank] = line["samples"]
    return {step: sorted(sample for one in by_rank.values() for sample in one) for step, by_rank in found.items()}


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


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "torch"])
def test_fewer_ranks_and_more_again(unbroken, tmp_path, transport):
    """Of two agents one is killed for good, with its rank; later another one joins. The global batch is the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.2"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
    options += ["--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2,is_host=%d"]
    program = (150, "--pace", 0.1, "--transport", transport)

    def options_of(is_host: int) -> list[str]:
        return [option % is_host if "%d" in option else option for option in options]

    def ranks_now() -> int:
        return begins(tmp_path)[-1][1] if begins(tmp_path) else 0

    with agent(tmp_path, *program, options=options_of(1), log="first") as first:
        with agent(tmp_path, *program, options=options_of(0), log="second") as second:
            wait_for(lambda: ranks_now() == 2 and len(steps(tmp_path)) > 5)
            kill_session(second.pid)
        wait_for(lambda: ranks_now() == 1 and lines(tmp_path, 0)[-1].get("step", 0) > 10)
        with agent(tmp_path, *program, options=options_of(0), log="third") as third:
            wait_for(lambda: begins(tmp_path)[-1][1] == 2 and "step" in lines(tmp_path, 0)[-1])
            assert (first.wait(120), third.wait(120)) == (0, 0), (tmp_path / "first").read_text()
    starts = begins(tmp_path)
    assert [ranks for _, ranks in starts] == [2, 1, 2]
    assert 0 < starts[1][0] < starts[2][0]
    seen, right = samples(tmp_path, 2), samples(unbroken, 2)
    assert all(seen[step] == right[step] for step in range(1, starts[1][0] + 1) if step in right)
    assert {len(found) for found in seen.values()} == {BATCH}
