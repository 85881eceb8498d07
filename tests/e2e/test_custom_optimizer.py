"""The example of a custom optimizer: it learns in every stage as plain PyTorch does, and goes on after a kill."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import custom_optimizer
import pytest
import torch
from warm_python import WarmPython

SCRIPT = Path(custom_optimizer.__file__)
STEPS = 40
TINY = ["--steps", STEPS, "--save-every", STEPS // 2, "--width", 32, "--context", 32, "--megabytes", 0.2, "--lr", 1e-2]
LINE = re.compile(r"stage (\d), 2 ranks: held out ([\d.]+); resumed at step (\d+): (.+)")


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, check=False)


def in_folder(folder: Path) -> list[Any]:
    return [*TINY, "--out", folder / "out", "--checkpoints", folder / "kept"]


def losses(folder: Path, stage: int) -> dict[int, str]:
    with (folder / "out" / f"stage-{stage}.csv").open(newline="") as stream:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, python: WarmPython) -> tuple[Path, str]:
    """The folder and the output of a run of all stages."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(*python.torchrun("--standalone", "--nproc-per-node", "2"), SCRIPT, *in_folder(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_learns_in_every_stage_and_goes_on_from_checkpoints_with_the_same_bits(whole):
    folder, said = whole
    (unigram,) = re.findall(r"unigram entropy\): ([\d.]+)", said)
    (plain,) = re.findall(r"plain PyTorch, one process: held out ([\d.]+)", said)
    lines = LINE.findall(said)
    assert [stage for stage, *_ in lines] == ["0", "1", "2", "3"]
    assert {resumed for *_, resumed in lines} == {"the same bits"}
    assert {step for _, _, step, _ in lines} == {str(STEPS // 2)}
    for _, held_out, *_ in lines:
        assert float(held_out) < float(unigram) - 0.1
        assert float(held_out) == pytest.approx(float(plain), abs=0.02)
    assert losses(folder, 0) == losses(folder, 1) == losses(folder, 2) == losses(folder, 3)
    assert (folder / "out" / "losses.png").stat().st_size > 10_000


def test_a_run_that_died_goes_on(whole, tmp_path, python):
    """Its last checkpoint is the one in the middle; other stages are complete, and one has not begun."""
    folder, said = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    kept = tmp_path / "kept"
    shutil.rmtree(kept / "stage-2" / f"global_step{STEPS}")
    (kept / "stage-2" / "latest").write_text(f"global_step{STEPS // 2}")
    shutil.rmtree(kept / "stage-3")
    done = run(*python.torchrun("--standalone", "--nproc-per-node", "2"), SCRIPT, *in_folder(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"goes on from {kept / 'stage-2' / f'global_step{STEPS // 2}'}" in done.stderr
    assert LINE.findall(done.stdout) == LINE.findall(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "1"], "--steps: '1' is not an integer from 2"),
        (["--text", "no-such-file"], "cannot read the text no-such-file"),
        (["--config", "no-such.json"], "no-such.json"),
        (["--stages", "4"], "--stages: invalid choice: 4"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, python, arguments, said):
    done = run(*python.command, SCRIPT, *in_folder(tmp_path), *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[partita]")]
    assert line.startswith("custom_optimizer.py: error: ") and said in line


def test_lion_is_the_update_of_its_paper():
    """c = b1 m + (1 - b1) g; w -= lr (sign(c) + decay w); m = b2 m + (1 - b2) g."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7))
    optimizer = custom_optimizer.Lion([weight], lr=0.1, betas=(0.8, 0.6), weight_decay=0.5)
    w, m = weight.detach().double(), torch.zeros(7, dtype=torch.float64)
    for _ in range(4):
        weight.grad = torch.randn(7)
        g = weight.grad.double()
        w = w - 0.1 * ((0.8 * m + 0.2 * g).sign() + 0.5 * w)
        m = 0.6 * m + 0.4 * g
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)
