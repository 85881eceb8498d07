"""What the README says can be done as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _run(command: list[str], folder: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run_example(index: int, ranks: int, folder: Path, python: WarmPython | None = None) -> str:
    """With the real python and torchrun, where none is given."""
    (folder / "train.py").write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[index])
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    if python is None:
        launcher = [sys.executable, *([] if ranks == 1 else ["-m", "torch.distributed.run", *options])]
    else:
        launcher = python.command if ranks == 1 else python.torchrun(*options)
    return _run([*launcher, "train.py"], folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_of_stage_3_runs_on_any_number_of_ranks(tmp_path, python, ranks):
    output = _run_example(1, ranks, tmp_path, python)
    assert output.count("gradient of shape (64, 64)") == ranks
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert len(weights) == 8 and not weights["3.0.bias"].any() and weights["3.0.weight"].any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_learns_on_any_number_of_ranks(tmp_path, python, ranks):
    output = _run_example(0, ranks, tmp_path, python if ranks == 1 else None)
    losses = {int(rank): float(loss) for rank, loss in re.findall(r"rank (\d+): loss ([\d.]+)", output)}
    assert losses.keys() == set(range(ranks))
    assert all(loss < 0.3 for loss in losses.values()), losses  # the targets' variance, where it starts, is about 1


def test_the_example_of_checkpoints_goes_on_on_another_number_of_ranks(tmp_path, python):
    assert "goes on" not in _run_example(2, 2, tmp_path, python)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "global_step10",
        "global_step20",
        "latest",
    ]
    output = _run_example(2, 1, tmp_path, python)
    assert output == f"rank 0: goes on from {tmp_path}/checkpoints/global_step20, with {{'note': 'mine'}}\n"


def test_the_example_of_a_pipeline_learns(tmp_path, python):
    output = _run_example(3, 2, tmp_path, python)
    found = sorted(re.findall(r"rank (\d): stages \[(\d, \d)\], loss ([\d.]+)", output))
    assert [(rank, stages) for rank, stages, _ in found] == [("0", "0, 2"), ("1", "1, 3")]
    assert len({loss for *_, loss in found}) == 1 and float(found[0][2]) < 0.2  # it begins above 1


def test_every_make_command_exists():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    commands = set(re.findall(r"\bmake ([a-z][a-z-]*)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"train", "test", "bench"} <= commands
    for target in commands:
        _run(["make", "-n", target], ROOT)


def test_every_link_leads_to_a_file():
    for page in ("README.md", "CONTRIBUTING.md", "docs/design.md"):
        links = re.findall(r"\]\(([^)#]+?)\)", (ROOT / page).read_text())
        missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
        assert not missing, f"{page}: {missing}"
