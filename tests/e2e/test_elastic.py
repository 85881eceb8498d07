"""Ranks that torchrun starts again after one was killed, also fewer of them; and signals to a job of torchrun's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import elastic_run
import pytest
from jobs import children_of
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
            kill_tree(process.pid)
            process.wait()


def kill_tree(agent: int) -> None:
    """The agent and its ranks, which are in sessions of their own. The agent first: it would start ranks again."""
    for pid in (agent, *children_of(agent)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def samples(folder: Path) -> dict[int, list[int]]:
    """Those of all ranks by step, as the last start that made the step has seen them."""
    made_by: dict[int, int] = {}  # step -> ranks
    ranks = 0
    for line in lines(folder, 0):
        ranks = line.get("ranks", ranks)
        if "step" in line:
            made_by[line["step"]] = ranks
    last = [{line["step"]: line["samples"] for line in lines(folder, rank) if "step" in line} for rank in (0, 1)]
    return {step: sorted(one for rank in range(n) for one in last[rank][step]) for step, n in made_by.items()}


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


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "torch"])
def test_fewer_ranks(unbroken, tmp_path, transport):
    """Of two agents one is killed for good, with its rank. The other one goes on alone, with the same global batch."""
    program, options = (40, "--pace", 0.1, "--transport", transport), elastic_options()
    with agent(tmp_path, *program, options=options(True), log="first") as first:
        with agent(tmp_path, *program, options=options(False), log="second") as second:
            wait_for(lambda: len(begins(tmp_path)) == 1 and len(steps(tmp_path)) > 5)
            kill_tree(second.pid)
        assert first.wait(90) == 0, (tmp_path / "first").read_text()
    (_, both), (step, alone) = begins(tmp_path)
    assert (both, alone) == (2, 1)
    assert step >= 4
    require_same_samples(tmp_path, unbroken)


@pytest.mark.slow
def test_fewer_ranks_and_more_again(unbroken, tmp_path, monkeypatch):
    """Another agent joins later. Without this variable torch's agents wait for an address that nobody tells them."""
    monkeypatch.setitem(ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    program, options = (250, "--pace", 0.1), elastic_options()
    with agent(tmp_path, *program, options=options(True), log="first") as first:
        with agent(tmp_path, *program, options=options(False), log="second") as second:
            wait_for(lambda: len(begins(tmp_path)) == 1 and len(steps(tmp_path)) > 5)
            kill_tree(second.pid)
        wait_for(lambda: len(begins(tmp_path)) == 2 and lines(tmp_path, 0)[-1].get("step", 0) > 10)
        with agent(tmp_path, *program, options=options(False), log="third") as third:
            assert (first.wait(120), third.wait(120)) == (0, 0), (tmp_path / "first").read_text()
    starts = begins(tmp_path)
    assert [ranks for _, ranks in starts] == [2, 1, 2]
    assert 4 <= starts[1][0] < starts[2][0] < 250
    require_same_samples(tmp_path, unbroken)


def elastic_options() -> Callable[[bool], list[str]]:
    """torchrun's options for one rank on each of one or two agents; the argument: whether it hosts their store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.2"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"]
    # Heartbeats come up to two intervals apart: who is gone after two is thought dead while it lives.
    times = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=10"
    return lambda hosts: [*options, "--rdzv-conf", f"{times},is_host={int(hosts)}"]


def require_same_samples(folder: Path, unbroken: Path) -> None:
    """Each step has as many samples as any, and those that it has in a run without faults."""
    seen = samples(folder)
    assert {len(found) for found in seen.values()} == {BATCH}
    for step, right in samples(unbroken).items():
        assert seen[step] == right, step
