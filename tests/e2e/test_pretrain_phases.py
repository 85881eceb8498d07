"""The two-phase recipe of pretraining: an autoencoder's embedding, the gain over a cold start, kills; evaluate.py."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import evaluate
import pretrain_lm
import pytest
import torch
from language.evaluation import held_out_of, open_language_model, text_loss
from language.models import LSTM, ModelConfig
from language.tokens import BPE
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from warm_python import WarmPython

SCRIPT = Path(pretrain_lm.__file__)
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")
STEPS = 30
OPTIONS = [
    *("--tokenizer", "bpe", "--vocabulary", 600, "--autoencoder", "--compare", "--autoencoder-steps", 40),
    *("--model", "lstm", "--layers", 1, "--embedding", 24, "--hidden", 32, "--context", 16, "--steps", STEPS),
    *("--lr", 1e-2, "--megabytes", 0.2, "--log-every", 5, "--eval-every", 10, "--sample-length", 5),
    *("--save-every", 10),
]
PAUSE = """
import sys, time
import partita
step = partita.Engine.step
partita.Engine.step = lambda self: (step(self), time.sleep(0.05))[0]
import pretrain_lm
sys.exit(pretrain_lm.main())
"""


def files(folder: Path) -> list[Any]:
    return ["--checkpoints", folder / "kept", "--out", folder / "out"]


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, check=False)


def table(file: Path) -> list[dict[str, float | None]]:
    with file.open(newline="") as stream:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> tuple[Path, str, str]:
    """A run of the recipe on two ranks: its folder, standard output and standard error."""
    folder = tmp_path_factory.mktemp("recipe")
    done = run(*python.torchrun(*TWO_RANKS), SCRIPT, *OPTIONS, *files(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def test_both_runs_learn_and_the_difference_is_the_gain(recipe):
    folder, output, errors = recipe
    warm, cold = table(folder / "out" / "metrics.csv"), table(folder / "out" / "cold.csv")
    for rows in (warm, cold):
        assert [row["step"] for row in rows if row["val_loss"] is not None] == [0, 10, 20, 30]
        assert rows[0]["val_loss"] == pytest.approx(math.log(600), abs=0.3)
        assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.3
    won = cold[-1]["val_loss"] - warm[-1]["val_loss"]
    assert won > 0.05
    assert output.splitlines()[-1].startswith(f"gain over a cold start at step {STEPS}: {won:.3f} nats per token = ")
    assert re.search(r"beats the unigram entropy \(|does not beat the unigram entropy \(", output)
    assert errors.count("to beat: the unigram entropy, ") == 1


def test_the_autoencoder_keeps_a_part_of_the_variance(recipe):
    folder, _, errors = recipe
    rows = table(folder / "out" / "embedding.csv")
    assert rows[0]["val_loss"] > 1 > rows[-1]["val_loss"] + 0.02
    kept = 1 - rows[-1]["val_loss"]
    assert (
        f"autoencoder: 600 tokens, 1,202 -> 24 -> 1,202; after 40 steps it keeps {kept:.1%} of the variance" in errors
    )


def test_the_model_is_described_and_has_its_tokenizer(recipe):
    folder = recipe[0] / "out"
    description = json.loads((folder / "model.json").read_text())
    assert description["pretrained_embedding"] is True
    model = LSTM(ModelConfig(**description["sizes"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert model.tokens.weight.shape == (600, 24)
    assert BPE.read(folder / "tokenizer.json").vocabulary == 600


def test_what_is_complete_says_so_and_tells_the_gain_again(recipe, python):
    folder, output, _ = recipe
    done = run(*python.command, SCRIPT, *OPTIONS, *files(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete already: ") == 3
    assert done.stdout.splitlines()[-1] == output.splitlines()[-1]


def test_other_options_than_the_checkpoints_are_one_line(recipe, python):
    done = run(*python.command, SCRIPT, *OPTIONS, *files(recipe[0]), "--vocabulary", 700)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "has vocabulary 600, this one 700: give the same --vocabulary, or another folder" in line


def last_step(table_file: Path) -> int:
    rows = table(table_file) if table_file.exists() else []
    return int(rows[-1]["step"]) if rows else -1


def kill_at(command: list[Any], file: Path, step: int) -> None:
    """Ends the program as a power cut does, when the table has this step."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    try:
        while last_step(file) < step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_kills_in_each_phase_change_no_number(tmp_path, python):
    """On one process, killed in the autoencoder, in the cold start and in the model's own training."""
    slow = tmp_path / "slow.py"
    slow.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{PAUSE}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for name, step in (("embedding.csv", 15), ("cold.csv", 15), ("metrics.csv", 20)):
        kill_at([*python.command, slow, *OPTIONS, *files(broken)], broken / "out" / name, step)
        assert last_step(broken / "out" / name) < STEPS + 10
    done = run(*python.command, SCRIPT, *OPTIONS, *files(broken))
    assert done.returncode == 0, done.stderr
    assert f"kept/global_step20, step 20 of {STEPS}" in done.stderr
    assert run(*python.command, SCRIPT, *OPTIONS, *files(whole)).stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


# -- evaluate.py


def evaluated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, Any]:
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    capsys.readouterr()
    return evaluate.main(), capsys.readouterr()


pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, without a real stderr


@pytest.mark.parametrize("path", ["out", "out/model.safetensors", "kept", "kept/global_step30", "kept/cold"])
def test_results_and_checkpoints_are_evaluated(recipe, monkeypatch, capsys, path):
    """The loss is that of the whole held-out text, window by window."""
    code, output = evaluated(monkeypatch, capsys, recipe[0] / path, "--sample-length", 5, "--prompt", "def ")
    assert code == 0, output.err
    model = open_language_model(recipe[0] / path)
    text, _, where = held_out_of(model, 10**6)
    ids = model.pieces.encode(text).long()
    firsts = range(0, len(ids) - 17, 16)
    with torch.no_grad():
        losses = [cross_entropy(model.logits(ids[None, i : i + 16])[0], ids[i + 1 : i + 17]) for i in firsts]
    whole = sum(losses).item() / len(losses)
    found = text_loss(model, text)
    assert found.mean == pytest.approx(whole, rel=0.01)  # the last window, shorter than the others
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / (len(text) - 1), rel=0.01)
    assert f"{where}: {found.mean:.4f} nats per token = perplexity {math.exp(found.mean):,.2f}" in output.out
    assert "unigram entropy: " in output.out and "-- sample 1\ndef " in output.out


def test_a_text_of_the_users_is_evaluated(recipe, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("import sys\n" * 50)
    code, output = evaluated(monkeypatch, capsys, recipe[0] / "out", "--text", tmp_path / "text.txt", "--samples", 0)
    assert code == 0, output.err
    assert f"{tmp_path}/text.txt: " in output.out and "(54" in output.out and "sample" not in output.out


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: None, "is not there: give the --out folder of a run, a checkpoint or a model's folder"),
        (lambda folder: folder.mkdir(), "is no model of the examples"),
        (lambda folder: folder.write_text("x"), "is no model of the examples"),
    ],
)
def test_paths_without_a_model_are_one_line(monkeypatch, capsys, tmp_path, make, complaint):
    make(tmp_path / "path")
    code, output = evaluated(monkeypatch, capsys, tmp_path / "path")
    assert (code, output.out) == (2, "")
    (line,) = output.err.splitlines()
    assert line.startswith("evaluate.py: error: ") and complaint in line


def test_damaged_results_are_one_line(recipe, monkeypatch, capsys, tmp_path):
    for name in ("model.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((recipe[0] / "out" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    for expected, spoil in (("cannot read the weights", "model.safetensors"), ("is no tokenizer", "tokenizer.json")):
        (tmp_path / spoil).write_bytes(b"nothing")
        code, output = evaluated(monkeypatch, capsys, tmp_path)
        assert code == 2
        (line,) = output.err.splitlines()
        assert expected in line and spoil in line
