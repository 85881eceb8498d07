"""The pretraining example is interrupted, killed and started again: it goes on, and says so."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pretrain_lm
import pytest
from jobs import children_of
from partita.checkpoint import checkpoints

SCRIPT = Path(pretrain_lm.__file__)
LAUNCH = [sys.executable, SCRIPT.with_name("launch.py"), "--standalone", "--nproc-per-node"]  # as `make train`
STEPS = 40
TINY = [
    *("--layers", 1, "--heads", 2, "--width", 32, "--context", 32, "--steps", STEPS, "--lr", 1e-2),
    *("--megabytes", 0.2, "--log-every", 1, "--eval-every", 100, "--eval-windows", 16, "--sample-length", 5),
    *("--save-every", 10),
]
PAUSE = """
import sys, time
import partita
step = partita.Engine.step
partita.Engine.step = lambda self: (step(self), time.sleep(0.1))[0]
import pretrain_lm
sys.exit(pretrain_lm.main())
"""


def files(folder: Path) -> list[Any]:
    return ["--checkpoints", folder / "kept", "--out", folder / "out"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "metrics.csv").open(newline="") as stream:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(stream)]


def last_step(folder: Path) -> int:
    return int(checkpoints(folder / "kept")[0].tag.removeprefix("global_step"))


def slowly(folder: Path) -> Path:
    """The example with a pause after each step, so that there is time to interrupt it."""
    script = folder / "slow.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{PAUSE}")
    return script


@contextmanager
def started(*command: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(*command: Any) -> tuple[int, str]:
    with started(*command) as process:
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_a_wrong_number_of_ranks_is_one_line():
    code, output = run(*LAUNCH, "two", SCRIPT)
    assert (code, output) == (2, "launch.py: error: Unsupported nproc_per_node value: two\n")


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not ((folder / "out" / "metrics.csv").exists() and len(rows(folder)) > step):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_what_was_interrupted_goes_on_to_the_same_numbers(tmp_path, python):
    """On one process: an unbroken run, and one with Ctrl-C in it."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = run(*python.command, SCRIPT, *TINY, *files(whole))
    assert code == 0, output
    with started(*python.command, slowly(tmp_path), *TINY, *files(broken)) as process:
        wait_for_step(process, broken, 13)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.count("saves and ends after this step") == 1
    last = last_step(broken)
    assert 13 <= last < STEPS and f"global_step{last}' at step {last}" in output
    code, output = run(*python.command, SCRIPT, *TINY, *files(broken))
    assert code == 0, output
    assert f"global_step{last}, step {last} of {STEPS}" in output
    # The run ended inside the last step, before its row.
    assert rows(broken) == [row for row in rows(whole) if row["step"] != str(last)]
    assert [row["step"] for row in rows(whole)] == [str(step) for step in range(STEPS + 1)]
    name = "model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "ranks"), [(0, 1), (1, 3)])
def test_after_a_killed_rank_other_ranks_go_on(tmp_path, killed, ranks):
    with started(*LAUNCH, 2, slowly(tmp_path), *TINY, *files(tmp_path)) as process:
        wait_for_step(process, tmp_path, 12)
        os.kill(children_of(process.pid)[killed], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in output, output
    assert output.splitlines()[-1].startswith(f"rank {killed} was ended by SIGKILL: the same command goes on")
    code, output = run(*LAUNCH, ranks, SCRIPT, *TINY, *files(tmp_path))
    assert code == 0, output
    assert f"of {STEPS}; a step now has {8 * ranks} windows, before it had 16" in output
    assert rows(tmp_path)[-1]["step"] == str(STEPS)


@pytest.mark.slow
def test_a_run_that_is_complete_says_so_and_goes_on_with_more_steps(tmp_path):
    command = [*LAUNCH, 2, SCRIPT, *TINY, *files(tmp_path)]
    assert run(*command, "--steps", 3)[0] == 0
    before = rows(tmp_path)
    code, output = run(*command, "--steps", 3)
    assert code == 0, output
    assert output.splitlines()[-1].startswith("complete already: ") and "more --steps" in output
    assert rows(tmp_path) == before
    code, output = run(*command, "--steps", 5)
    assert code == 0, output
    assert rows(tmp_path)[: len(before)] == before and rows(tmp_path)[-1]["step"] == "5"


@pytest.mark.slow
def test_ctrl_c_saves_on_all_ranks(tmp_path):
    with started(*LAUNCH, 2, slowly(tmp_path), *TINY, *files(tmp_path)) as process:
        wait_for_step(process, tmp_path, 3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    last = last_step(tmp_path)
    assert 3 <= last < STEPS and f"global_step{last}' at step {last}" in output


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "kept").write_text("a file")
    code, output = run(*LAUNCH, 2, SCRIPT, *TINY, *files(tmp_path))
    assert code == 1
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("pretrain_lm.py: error: no checkpoint can be saved in ")
    (tmp_path / "kept").unlink()
    assert run(sys.executable, SCRIPT, *TINY, "--steps", 2, *files(tmp_path))[0] == 0
    code, output = run(sys.executable, SCRIPT, *TINY, "--width", 64, *files(tmp_path))
    assert code == 1
    assert "Traceback" not in output
    assert "it is of another model" in output.splitlines()[-1]
