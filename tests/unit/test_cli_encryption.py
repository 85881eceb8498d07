"""The commands for encrypted checkpoints: inspect, verify and export with keys, rekey, new-key, audit verify."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save as save_plain
from partita.checkpoint import audit, new_key
from partita.checkpoint.user_key import parse_key
from partita.cli.commands import app
from resumed import config_for, engine_for, take_steps
from typer.testing import CliRunner, Result

KEY, OTHER = new_key(), new_key()


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    os.environ["A_KEY"] = KEY
    engine = engine_for(config_for(1, 1, "split", checkpoint={"encryption": {"key_env": "A_KEY"}}), seed=1)
    for _ in range(2):
        take_steps(engine, 1)
        engine.save_checkpoint(folder)
    engine.destroy()
    del os.environ["A_KEY"]
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_inspect_and_verify_go_without_a_key(copy):
    shown = run("checkpoint", "inspect", copy).output
    assert "encrypted" in shown and "bf16" not in shown
    assert "bf16" in run("checkpoint", "inspect", copy, "--key-env", "A_KEY").output
    assert "another key" in run("checkpoint", "inspect", copy, "--key-env", "OTHER_KEY").output
    assert "only damage" in run("checkpoint", "verify", copy).output
    done = run("checkpoint", "verify", copy, "--key-env", "A_KEY")
    assert done.exit_code == 0 and "only damage" not in done.output
    done = run("checkpoint", "verify", copy, "--key-env", "OTHER_KEY")
    assert done.exit_code == 1 and "does not hold the key" in done.output


def test_export_needs_the_key(copy, tmp_path):
    target = tmp_path / "weights.safetensors"
    for options in ((), ("--key-env", "OTHER_KEY"), ("--key-env", "A_KEY", "--key-file", "x")):
        done = run("checkpoint", "export", copy, target, *options)
        assert done.exit_code == 1 and "key" in done.output and not target.exists()
    assert run("checkpoint", "export", copy, target, "--key-env", "A_KEY").exit_code == 0
    assert target.exists()
    done = run("audit", "verify", copy, "--key-env", "A_KEY")
    assert done.exit_code == 0 and "3 lines" in done.output
    assert "exported" in (copy / audit.LOG).read_text()


def test_rekey(copy):
    data = {path: path.read_bytes() for path in copy.rglob("*.safetensors")}
    old, new = ("--key-env", "A_KEY"), ("--new-key-env", "OTHER_KEY")
    done = run("checkpoint", "rekey", copy, "--key-env", "OTHER_KEY", "--new-key-env", "A_KEY")
    assert done.exit_code == 0 and "all had the new key already" in done.output
    assert run("checkpoint", "rekey", copy, *old, *new, "--tag", "global_step1").exit_code == 0
    assert run("checkpoint", "verify", copy, "--tag", "global_step1", *old).exit_code == 1
    assert run("checkpoint", "verify", copy, "--tag", "global_step2", *old).exit_code == 0
    assert run("checkpoint", "rekey", copy, *old, *new).output.count("has the new key") == 1
    for tag in ("global_step1", "global_step2"):
        assert run("checkpoint", "verify", copy, "--tag", tag, *old).exit_code == 1
        assert run("checkpoint", "verify", copy, "--tag", tag, "--key-env", "OTHER_KEY").exit_code == 0
    assert run("audit", "verify", copy, "--key-env", "OTHER_KEY").exit_code == 0
    assert run("audit", "verify", copy, "--key-env", "A_KEY").exit_code == 1
    assert data == {path: path.read_bytes() for path in copy.rglob("*.safetensors")}


def test_rekey_with_a_wrong_key_changes_nothing(copy, monkeypatch):
    monkeypatch.setenv("THIRD_KEY", secrets.token_hex(32))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run("checkpoint", "rekey", copy, "--key-env", "THIRD_KEY", "--new-key-env", "OTHER_KEY")
    assert done.exit_code == 1 and "does not hold the key" in done.output
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_an_older_checkpoint_in_the_place_of_a_newer_is_found_by_the_log(copy, tmp_path, monkeypatch):
    older = shutil.copytree(copy / "global_step2", tmp_path / "older")
    monkeypatch.setenv("A_KEY", KEY)
    engine = engine_for(config_for(1, 1, "split", checkpoint={"encryption": {"key_env": "A_KEY"}}), seed=1)
    take_steps(engine, 2)
    engine.save_checkpoint(copy)
    engine.destroy()
    assert run("audit", "verify", copy, "--key-env", "A_KEY").exit_code == 0
    shutil.rmtree(copy / "global_step2")
    shutil.copytree(older, copy / "global_step2")
    done = run("audit", "verify", copy, "--key-env", "A_KEY")
    assert done.exit_code == 1 and "not the checkpoint that was saved last" in done.output


def test_a_line_that_was_noted_must_be_there(copy):
    last = run("audit", "verify", copy, "--key-env", "A_KEY").output.split()[-1]
    assert run("audit", "verify", copy, "--key-env", "A_KEY", "--holds", last).exit_code == 0
    assert run("audit", "verify", copy, "--key-env", "A_KEY", "--holds", "9:" + "0" * 64).exit_code == 1


def test_a_new_key_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)
    assert parse_key(run("checkpoint", "new-key").output, "the key")
    save_plain(tmp_path, "a", 1)
    assert "no encrypted checkpoint" in run(
        "checkpoint", "rekey", tmp_path, "--key-env", "A_KEY", "--new-key-env", "OTHER_KEY"
    ).output.replace("\n", " ")
