"""The real sizes of pretraining on real text: the articles' LSTM, and the gain of the two-phase recipe (slow)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretrain_lm
import pytest

SCRIPT = Path(pretrain_lm.__file__)
TWO_RANKS = [sys.executable, SCRIPT.with_name("launch.py"), "--standalone", "--nproc-per-node", 2]
LSTM = ("--tokenizer", "bpe", "--model", "lstm", "--layers", 1, "--embedding", 128, "--hidden", 256)


def trained(folder: Path, *options: Any) -> str:
    """What a run on Python's own source prints."""
    command = [*TWO_RANKS, SCRIPT, *LSTM, "--megabytes", 5, "--out", folder, "--no-checkpoints", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_articles_sizes_run(tmp_path):
    """10,000 tokens, 128 and 256, batches of 64 x 100."""
    sizes = ("--vocabulary", 10_000, "--batch-size", 32, "--context", 100)
    output = trained(tmp_path, *sizes, "--steps", 12, "--log-every", 1, "--eval-windows", 8)
    assert json.loads((tmp_path / "config.json").read_text())["train_batch_size"] == 64
    described = json.loads((tmp_path / "model.json").read_text())["sizes"]
    names = ("vocabulary", "context", "layers", "embedding", "width")
    assert [described[name] for name in names] == [10_000, 100, 1, 128, 256]
    assert "4.25 M parameters" in output
    loss = float(re.search(r"validation ([\d.]+) nats", output)[1])
    assert loss < 8.7  # where it begins is log(10,000) = 9.21


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_beats_the_unigram_entropy_and_a_cold_start(tmp_path):
    sizes = ("--vocabulary", 4000, "--context", 64, "--lr", 4e-3)
    output = trained(tmp_path, *sizes, "--steps", 200, "--eval-every", 50, "--autoencoder", "--compare")
    beaten = float(re.search(r" beats the unigram entropy \(.*?\) by ([\d.]+) nats", output)[1])
    won = float(re.search(r"^gain over a cold start at step 200: ([\d.]+) nats", output, re.M)[1])
    assert beaten > 0.5 and won > 0.2
