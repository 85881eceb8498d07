"""The pretraining example as a user runs it: what it writes, what it says, how it fails."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pretrain_lm
import pytest
import torch
from language.models import GPT, LSTM, ModelConfig
from language.text import split, standard_library_text
from partita.config import load_config
from safetensors.torch import load_file
from warm_python import WarmPython

SCRIPT = Path(pretrain_lm.__file__)
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")
STEPS, EVAL_WINDOWS, MEGABYTES = 20, 16, 0.2
TINY = [
    *("--model", "gpt", "--layers", 2, "--heads", 2, "--width", 32, "--context", 32),
    *("--steps", STEPS, "--batch-size", 8, "--lr", 1e-2, "--megabytes", MEGABYTES),
    *("--log-every", 2, "--eval-every", 10, "--eval-windows", EVAL_WINDOWS, "--sample-length", 20, "--no-checkpoints"),
]
FILES = {"model.safetensors", "model.json", "config.json", "metrics.csv", "metrics.jsonl", "loss.png", "sample.txt"}
RUNS = {"gpt-0": ("gpt", 0), "gpt-1": ("gpt", 1), "gpt-2": ("gpt", 2), "gpt-3": ("gpt", 3), "lstm-3": ("lstm", 3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> dict[str, tuple[Path, str, str]]:
    """The folder, the standard output and the standard error of each of RUNS on two ranks."""
    results = {}
    for name, (model, stage) in RUNS.items():
        out = tmp_path_factory.mktemp(name)
        done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *TINY, "--model", model, "--stage", stage, "--out", out)
        assert done.returncode == 0, done.stderr
        results[name] = out, done.stdout, done.stderr
    return results


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, check=False)


def metrics(folder: Path) -> list[dict[str, float | None]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(stream)]


@pytest.mark.parametrize("name", RUNS)
def test_writes_its_results(runs, name):
    folder, output, _ = runs[name]
    assert {file.name for file in folder.iterdir()} == FILES
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (folder / "sample.txt").read_text().startswith("def ")
    config = load_config(folder / "config.json")
    assert config.train_batch_size == 16
    assert config.zero_optimization.stage == RUNS[name][1]
    summary = output.strip().splitlines()[-1]
    assert f"2 ranks: {STEPS} steps" in summary
    assert f"validation {metrics(folder)[-1]['val_loss']:.3f} nats" in summary
    baseline = float(re.search(r"beats? the unigram entropy \(([\d.]+) nats", summary)[1])
    assert 2.5 < baseline < 3.5  # of a text's bytes
    assert ("does not beat" in summary) == (metrics(folder)[-1]["val_loss"] > baseline)


@pytest.mark.parametrize("name", RUNS)
def test_learns(runs, name):
    rows = metrics(runs[name][0])
    assert [row["step"] for row in rows] == list(range(0, STEPS + 1, 2))
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [0, 10, 20]
    assert rows[0]["val_loss"] == pytest.approx(math.log(256), abs=0.3)
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.5
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["val_loss"] / math.log(2))
    assert all(row["tokens_per_s"] > 0 and row["grad_norm"] > 0 for row in rows[1:])
    assert max(row["lr"] for row in rows) <= 1e-2


@pytest.mark.parametrize("name", RUNS)
def test_saved_weights_give_the_reported_validation_loss(runs, name):
    """Loaded strictly into a fresh model in one process."""
    folder, _, _ = runs[name]
    description = json.loads((folder / "model.json").read_text())
    model = {"gpt": GPT, "lstm": LSTM}[description["architecture"]](ModelConfig(**description["sizes"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    text = standard_library_text(int(MEGABYTES * 1e6))
    held_out = split(text, 32, train_windows=1, held_out_windows=1).held_out
    samples = [held_out[i] for i in held_out.spread(EVAL_WINDOWS)]
    with torch.no_grad():
        loss = model(torch.stack([tokens for tokens, _ in samples]), torch.stack([targets for _, targets in samples]))
    assert loss.item() == pytest.approx(metrics(folder)[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_without_a_terminal_progress_is_plain_lines(runs, name):
    """No control characters, one line per row of metrics with its loss."""
    stderr = runs[name][2]
    lines = [line for line in stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/{STEPS}" for step in range(2, STEPS + 1, 2)]
    for line, row in zip(lines, metrics(runs[name][0])[1:], strict=True):
        assert f"loss {row['loss']:.3f} " in line
    assert not re.search(r"[\r\x1b]|it/s|%", stderr)


@pytest.mark.parametrize("name", RUNS)
def test_files_can_be_read_by_whom_the_user_lets(runs, name):
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in runs[name][0].iterdir()} == {0o666 & ~umask}


def test_stages_give_the_same_bits(runs):
    def without_time(folder: Path) -> list[dict[str, float | None]]:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in metrics(folder)]

    first, *others = (runs[f"gpt-{stage}"][0] for stage in (0, 1, 2, 3))
    for other in others:
        assert without_time(other) == without_time(first)
        assert (other / "sample.txt").read_bytes() == (first / "sample.txt").read_bytes()
        weights = load_file(first / "model.safetensors")
        for name, weight in load_file(other / "model.safetensors").items():
            assert torch.equal(weight, weights.pop(name)), name
        assert not weights


def test_interrupt_stops_cleanly_with_results(tmp_path):
    """In one process, with a config file that replaces a key."""
    config = tmp_path / "config.json"
    config.write_text('{"gradient_clipping": 0.25}')
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, *TINY, "--steps", 100_000, "--config", config, "--out", out, "--accumulate", 2]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.csv").exists() and len(metrics(out)) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    expected = ("to beat: ", "step ", "[partita] ZeRO", "Ctrl-C: ")
    assert not [line for line in stderr.splitlines() if line and not line.startswith(expected)]
    assert {file.name for file in out.iterdir()} == FILES
    assert metrics(out)[-1]["val_loss"] is not None
    saved = load_config(out / "config.json")
    assert (saved.gradient_clipping, saved.gradient_accumulation_steps, saved.train_batch_size) == (0.25, 2, 16)


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's record, without a real stderr
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--steps 0", "--steps: '0' is not an integer from 1"),
        ("--steps many", "--steps: 'many' is not an integer"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr: 'nan' is not a number above 0"),
        ("--stage 7", "--stage: invalid choice"),
        ("--width 30 --heads 4", "--width 30 is not a multiple of --heads 4"),
        ("--model rnn", "--model: invalid choice: 'rnn'"),
        ("--learning 1", "unrecognized arguments: --learning 1"),
        (f"--seed {2**32}", "--seed: '4294967296' is not an integer from 0 to 4294967295"),
        (f"--out {__file__}", "is a file: give a folder"),
        ("--out=", "--out: '' is no folder"),
        pytest.param(
            "--device cuda",
            "--device: torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_values_are_one_line(monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["pretrain_lm.py", *arguments.split()])
    assert pretrain_lm.main() == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("pretrain_lm.py: error: ")
    assert complaint in line


def test_files_that_cannot_be_used_are_one_line(tmp_path, python):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "config.json").write_text('{"gradient_cliping": 1}')
    for arguments, complaint in (
        (["--text", tmp_path / "missing.txt"], "missing.txt: No such file or directory"),
        (["--config", tmp_path / "config.json"], "gradient_cliping"),
    ):
        done = run(*python.command, SCRIPT, *TINY, "--out", tmp_path / "out", *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert complaint in line
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *TINY, "--out", tmp_path / "out", "--text", tmp_path / "short.txt")
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain_lm.py: error: ")]
    assert len(lines) == 1, done.stderr
    assert "the text is too short: 9 bytes" in lines[0]
    assert re.search(r"rank +: 0 .*\n.*exitcode +: 2 ", done.stderr)
    end = "\n".join(done.stderr.splitlines()[-10:])
    assert "the text is too short: 9 bytes" in end and "give a longer text" in end, end


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_result_that_would_replace_a_pipe_is_refused_before_training(tmp_path, python, name):
    """F61."""
    os.mkfifo(tmp_path / name)
    done = run(*python.command, SCRIPT, *TINY, "--out", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{name}' is a pipe" in line
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
