"""The pipeline example as a user runs it: it learns alike with every schedule, goes on, and says what is wrong."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pipeline_gpt
import pytest
from partita.checkpoint import checkpoints
from warm_python import WarmPython

SCRIPT = Path(pipeline_gpt.__file__)
TINY = [
    *("--layers", 3, "--heads", 2, "--width", 32, "--context", 32, "--megabytes", 0.1),
    *("--steps", 20, "--batch-size", 4, "--micro-batches", 4, "--lr", 1e-2, "--log-every", 5),
]


def run(python: WarmPython, ranks: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [*python.torchrun("--standalone", "--nproc-per-node", str(ranks)), SCRIPT, *TINY, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, check=False)


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+)/\d+ loss ([\d.]+)", output, re.MULTILINE)}


def validation(output: str) -> float:
    (value,) = re.findall(r"validation ([\d.]+) nats", output)
    return float(value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> tuple[str, Path]:
    """What the run with its default schedule on one pipeline prints, and its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    done = run(python, 2, "--checkpoints", folder, "--save-every", 20)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, folder


def test_learns(plain):
    output, _ = plain
    found = losses(output)
    assert list(found) == [5, 10, 15, 20]
    assert found[20] < found[5] - 0.5
    assert validation(output) < 4
    assert 2 < float(re.findall(r"frequencies alone ([\d.]+)", output)[0]) < 4  # nats per byte
    assert output.count("validation") == 1  # one rank speaks
    assert "1f1b on 1 x 2 ranks: 20 steps" in output


@pytest.mark.slow
def test_another_schedule_gives_the_same_losses(plain, python):
    """With two stages per rank, and activations that are recomputed; printed with three digits."""
    done = run(python, 2, "--schedule", "interleaved", "--chunks", 2, "--recompute", 1)
    assert done.returncode == 0, done.stderr
    assert losses(done.stderr) == pytest.approx(losses(plain[0]), abs=0.0015)
    assert validation(done.stdout) == pytest.approx(validation(plain[0]), abs=0.0015)


def test_two_pipelines_go_on_from_a_checkpoint_of_one(plain, python):
    """2 x 2 ranks, another schedule and ZeRO stage, half the micro-batches in each: a step has as many samples."""
    output, folder = plain
    more = ("--schedule", "zb-h1", "--stage", 2, "--micro-batches", 2, "--steps", 30)
    done = run(python, 4, "--checkpoints", folder, *more)
    assert done.returncode == 0, done.stderr
    assert f"goes on from {folder}/global_step20, step 20 of 30" in done.stderr
    assert list(losses(done.stderr)) == [25, 30]
    assert losses(done.stderr)[25] < losses(output)[15]
    assert "zb-h1 on 2 x 2 ranks" in done.stdout


@pytest.mark.slow
def test_ctrl_c_saves_and_ends(tmp_path):
    launch = [SCRIPT.with_name("launch.py"), "--standalone", "--nproc-per-node", 2, SCRIPT, *TINY, "--steps", 100_000]
    command = [str(part) for part in (sys.executable, *launch, "--checkpoints", tmp_path, "--save-every", 2)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not checkpoints(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "saves and ends after this step" in output
    assert f"saved '{checkpoints(tmp_path)[0].path}'" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--schedule", "1f1"], "did you mean '1f1b'?"),
        pytest.param(["--pipe", "3"], "--pipe 3 does not divide the number of ranks, 2", marks=pytest.mark.slow),
        pytest.param(
            ["--layers", "1", "--schedule", "interleaved", "--chunks", "5"], "10 stages", marks=pytest.mark.slow
        ),
    ],
)
def test_what_cannot_be_is_one_line(python, arguments, complaint):
    done = run(python, 2, *arguments)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("pipeline_gpt.py: error: "))
    assert complaint in line
    assert done.returncode != 0 and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--width 30 --heads 4", "--width 30 is not a multiple of --heads 4"),
        ("--stage 3", "--stage: invalid choice"),
        ("--chunks 0", "--chunks: '0' is not an integer from 1"),
    ],
)
def test_a_bad_value_is_one_line(monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["pipeline_gpt.py", *arguments.split()])
    assert pipeline_gpt.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipeline_gpt.py: error: ") and complaint in line


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline_gpt.py", "--help"])
    assert pipeline_gpt.main() == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("--schedule", "--chunks", "--pipe", "--checkpoints"))
