"""Trainer and Accelerator with a config of DeepSpeed's, over Partita by the alias: DeepSpeed's figures, stages 0 to 3.

`deepspeed-0.19.8-huggingface.json` has what the same program reported with DeepSpeed 0.19.8, by number of ranks:

    torchrun --standalone --nproc-per-node 2 tests/harness/trained_by_deepspeed.py FOLDER 0,1,2,3 '{"resume": false}'
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

PROGRAM = Path(__file__).parents[1] / "harness" / "trained_by_deepspeed.py"
RECORDED = Path(__file__).with_name("deepspeed-0.19.8-huggingface.json")
STAGES = ("0", "1", "2", "3")
WORLD_SIZES = [pytest.param(1, marks=pytest.mark.slow), 2]


@pytest.fixture(scope="module")
def runs(python, tmp_path_factory):
    """runs(ranks): the folder of the program's runs, which are made once, and their figures by stage."""

    @cache
    def run(world_size: int) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        launcher = python.torchrun("--standalone", "--nproc-per-node", str(world_size))
        command = [*launcher, "-m", "partita", "run", str(PROGRAM), str(folder), ",".join(STAGES)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, json.loads((folder / "figures.json").read_text())

    return run


def numbers(figures: dict[str, Any], name: str) -> list[float]:
    values = figures[name] if isinstance(figures[name], list) else [figures[name]]
    return [value for value in values if value is not None]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("by", ["trainer", "accelerator"])
def test_the_figures_are_those_of_deepspeed(runs, by, world_size, stage):
    """Losses, norms and learning rates of every step, and the loss of the evaluation: equal to rounding.

    In stage 0 DeepSpeed reports no norm."""
    ours = runs(world_size)[1][stage][by]
    theirs = json.loads(RECORDED.read_text())[str(world_size)][stage][by]
    for name in theirs:
        if theirs_numbers := numbers(theirs, name):
            assert numbers(ours, name) == pytest.approx(theirs_numbers, rel=2e-6), name
    assert len(set(ours["loss"])) > 5
    assert len(numbers(ours, "grad_norm")) == 6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("by", ["trainer", "accelerator"])
def test_a_run_that_is_resumed_in_the_middle_is_the_unbroken_one(runs, by, world_size, stage):
    """Every figure after the checkpoint, bit for bit, and the weights."""
    folder, figures = runs(world_size)
    unbroken, again = figures[stage][by], figures[stage][f"{by} again"]
    for name, value in again.items():
        same = unbroken[name][-len(value) :] if isinstance(value, list) else unbroken[name]
        assert value == same and value, name
    own = folder / f"stage{stage}"
    if by == "trainer":
        first, second = (load_file(own / name / "model.safetensors") for name in ("unbroken", "resumed"))
    else:
        first, second = (torch.load(own / f"accelerated-{name}.pt", weights_only=True) for name in (False, True))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", STAGES)
def test_from_pretrained_reads_what_save_model_wrote(runs, stage):
    """The weights of the last checkpoint, and the tied one once in the file."""
    own = runs(2)[0] / f"stage{stage}"
    saved = own / "unbroken"
    assert len({"lm_head.weight", "transformer.wte.weight"} & load_file(saved / "model.safetensors").keys()) == 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved).state_dict()
    checkpoint = load_file(own / "checkpoint-6" / "global_step6" / "model.safetensors")
    assert len(checkpoint) >= len(loaded) - 1
    assert all(torch.equal(loaded[name], value) for name, value in checkpoint.items())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_recorded_figures_are_those_of_deepspeed(tmp_path):
    """The same program, with the DeepSpeed that is installed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    command = [*launcher, str(tmp_path), ",".join(STAGES), '{"resume": false}']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = json.loads(RECORDED.read_text())["2"]
    for stage, figures in json.loads((tmp_path / "figures.json").read_text()).items():
        for by, own in figures.items():
            for name in own:
                assert numbers(own, name) == pytest.approx(numbers(recorded[stage][by], name), rel=1e-6), (stage, name)
