"""The five groups of calls that articles about DeepSpeed have, by both doors: the package's name, and the alias."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import PROGRAMS

pytest.importorskip("transformers")
GROUPS = (
    "an_engine_of_a_model",
    "an_engine_with_a_custom_optimizer",
    "train_batch_over_a_loader",
    "chat_fine_tuning",
    "a_plain_loop_with_the_default_config",
)


@pytest.fixture(scope="module")
def articles() -> dict[str, Any]:
    """The program with nothing changed but the import."""
    program = PROGRAMS / "articles.py"
    named: dict[str, Any] = {"__name__": "articles"}
    text = program.read_text().replace("from deepspeed", "from partita.compat.deepspeed")
    exec(compile(text, str(program), "exec"), named)
    return named


@pytest.mark.parametrize("group", GROUPS)
def test_the_calls_train_with_the_import_changed(articles, group: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = articles[group]()
    assert losses[-1] < losses[0] and all(loss == loss for loss in losses), losses


def test_the_program_runs_unchanged_and_gives_the_same(articles, tmp_path: Path, python, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*python.command, "-m", "partita", "run", str(PROGRAMS / "articles.py")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said) == [group.__name__ for group in articles["GROUPS"]] == list(GROUPS)
    for name, losses in said.items():
        assert losses == pytest.approx(articles[name](), rel=1e-5), name
