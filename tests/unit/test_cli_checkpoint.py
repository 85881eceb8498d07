"""The command `partita checkpoint`: inspect, verify, export, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from partita.checkpoint import new_key
from partita.cli.commands import app
from partita.utils import safe_get_full_fp32_param
from resumed import Model, config_for, engine_for, take_steps
from safetensors.torch import load_file
from typer.testing import CliRunner, Result


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the checkpoints of steps 1 to 3 of a run with split masters; the masters of step 3."""
    folder = tmp_path_factory.mktemp("saved")
    engine = engine_for(config_for(1, 1, "split"), seed=1)
    for _ in range(3):
        take_steps(engine, 1)
        engine.save_checkpoint(folder)
    masters = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.destroy()
    return folder, {name: value for name, value in masters.items() if value is not None}


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_inspect_lists_what_there_is(saved):
    done = run("inspect", saved[0])
    assert done.exit_code == 0
    lines = [line for line in done.output.splitlines() if "global_step" in line]
    assert [f"global_step{step}" in line for step, line in zip((3, 2, 1), lines, strict=True)] == [True] * 3
    assert "(latest)" in lines[0] and "(latest)" not in lines[1]
    for word in ("stage 1", "bf16", "36"):  # 3 steps of 12 samples
        assert word in lines[0]


def test_verify_says_that_all_is_well_or_what_is_not(folder):
    done = run("verify", folder)
    assert done.exit_code == 0 and "is sound" in done.output
    file = folder / "global_step3" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (folder / "global_step3" / "state.json").unlink()
    done = run("verify", folder)
    assert done.exit_code == 1
    assert "state.json" in done.output  # a checkpoint without a file is none
    (folder / "latest").write_text("global_step2")
    assert run("verify", folder).exit_code == 0


def test_verify_goes_on_after_a_problem(folder):
    for name in ("model.safetensors", "optimizer.safetensors"):
        file = folder / "global_step3" / name
        data = bytearray(file.read_bytes())
        data[20] ^= 1
        data[-1] ^= 1
        file.write_bytes(data)
    done = run("verify", folder, "--tag", "global_step3")
    assert done.exit_code == 1
    problems = [line for line in done.output.splitlines() if "not the bytes" in line]
    assert len(problems) == 4
    assert run("verify", folder, "--tag", "global_step1").exit_code == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "as saved"])
def test_export_writes_one_file(saved, tmp_path, dtype):
    folder, masters = saved
    done = run("export", folder, tmp_path / "weights.safetensors", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    weights = load_file(tmp_path / "weights.safetensors")
    kept = load_file(folder / "global_step3" / "model.safetensors")
    Model(2).load_state_dict(weights, strict=True)
    for name, value in weights.items():
        stored = {"tied.weight": "layers.0.weight"}.get(name, name)
        expected = masters[stored] if dtype == "fp32" and stored in masters else kept[stored]
        if dtype == "fp32" and expected.is_floating_point():
            expected = expected.float()
        if dtype == "bf16" and expected.is_floating_point():
            expected = expected.bfloat16()
        assert value.dtype == expected.dtype and torch.equal(value, expected), name


def test_prune_keeps_the_newest(folder):
    done = run("prune", folder, "--keep", 2)
    assert done.exit_code == 0 and done.output.count("deleted") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["global_step2", "global_step3", "latest"]
    assert run("prune", folder, "--keep", 0).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [("inspect",), ("verify",), ("export", "x.safetensors"), ("prune", "--keep", "1")]
)
def test_a_wrong_folder_is_named(tmp_path, arguments):
    command, *rest = arguments
    done = run(command, tmp_path / "nothing", *rest)
    assert done.exit_code == 1
    assert str(tmp_path / "nothing") in done.output.replace("\n", "")


def test_a_dtype_that_is_none_and_a_place_that_is_taken(saved, tmp_path):
    assert "fp64" in run("export", saved[0], tmp_path / "x", "--dtype", "fp64").output
    (tmp_path / "x").touch()
    done = run("export", saved[0], tmp_path / "x")
    assert done.exit_code == 1 and "is a file" in done.output


def test_export_into_a_folder(saved, tmp_path):
    assert run("export", saved[0], tmp_path / "new", "--dtype", "as saved").exit_code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_export_leaves_a_checkpoint_as_it_is(folder):
    """Neither over a file of it nor beside its files, by whatever path; beside its folder is all right."""
    (folder / "link").symlink_to(folder / "global_step2")
    for place in ("global_step3/model.safetensors", "global_step1/new.safetensors", "link/deeper/new.safetensors"):
        done = run("export", folder, folder / place)
        assert done.exit_code == 1 and "would be in the checkpoint" in done.output, place
        assert "\n" not in done.output.strip()
    for step in (1, 2, 3):
        assert run("verify", folder, "--tag", f"global_step{step}").exit_code == 0
    assert run("export", folder, folder / "new.safetensors").exit_code == 0


@pytest.mark.parametrize("command", ["inspect", "verify", "prune --keep 1", "export OUT", "encrypt --key-env A_KEY"])
def test_another_folder_is_one_line(folder, tmp_path, monkeypatch, command):
    """One that is not there, a file, an empty one, a checkpoint."""
    monkeypatch.setenv("A_KEY", new_key())
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    name, *options = command.replace("OUT", str(tmp_path / "out.safetensors")).split()
    wrong = {
        tmp_path / "nowhere": "is not there",
        tmp_path / "file": "is a file, not a folder",
        tmp_path / "empty": "no whole checkpoint",
        folder / "global_step1": "is a checkpoint: give the folder that it is in",
    }
    for path, words in wrong.items():
        done = run(name, path, *options)
        assert done.exit_code == 1 and words in done.output, done.output
        assert len(done.output.splitlines()) == 1 and str(path) in done.output
