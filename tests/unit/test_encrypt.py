"""`partita checkpoint encrypt`; and the lines of the audit log of what was pruned, encrypted or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from partita.checkpoint import audit, checkpoints, encrypt, find, new_key
from partita.checkpoint.user_key import parse_key
from partita.cli.commands import app
from resumed import config_for, differences, engine_for, take_steps, whole_state
from typer.testing import CliRunner, Result

KEY, OTHER = new_key(), new_key()
WITH_KEY = ("--key-env", "A_KEY")
TAG = "global_step2"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with plain checkpoints of two steps, the later one with a file of the program's; its state."""
    folder = tmp_path_factory.mktemp("plain")
    engine = engine_for(config_for(1, 1, "split"), seed=1)
    for _ in range(2):
        take_steps(engine, 1)
        engine.save_checkpoint(folder)
    state = whole_state(engine, "AdamW")
    engine.destroy()
    (folder / TAG / "config.json").write_text("{}")
    return folder, state


@pytest.fixture
def copy(plain: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain[0], tmp_path / "copy"))


def told(folder: Path) -> list[tuple[str, str, bool]]:
    """What the log says was done, with which tag, and whether the checkpoint is named."""
    lines = map(json.loads, (folder / audit.LOG).read_text().splitlines())
    assert CliRunner().invoke(app, ["audit", "verify", str(folder), *WITH_KEY]).exit_code == 0
    return [(line["what"], line["tag"], bool(line["checkpoint"])) for line in lines]


def sealed_config(**keeps: Any) -> dict[str, Any]:
    return config_for(1, 1, "split", checkpoint={"encryption": {"key_env": "A_KEY"}, **keeps})


def test_what_was_encrypted_is_all_there_and_nothing_is_in_the_clear(plain, copy):
    created = [one.manifest.created for one in checkpoints(copy)]
    done = run("encrypt", copy, *WITH_KEY)
    assert done.exit_code == 0 and done.output.count("is encrypted") == 2, done.output
    assert [one.manifest.created for one in checkpoints(copy)] == created
    assert (copy / "latest").read_text() == TAG and (copy / TAG / "config.json").read_text() == "{}"
    files = [path for path in copy.rglob("*") if path.is_file() and path.name != "config.json"]
    assert not any(b"data_offsets" in path.read_bytes() or b"sections" in path.read_bytes() for path in files)
    assert "bf16" in run("inspect", copy, *WITH_KEY).output
    engine = engine_for(sealed_config(), seed=2)
    engine.load_checkpoint(copy)
    assert differences(whole_state(engine, "AdamW"), plain[1]) == []
    engine.destroy()
    assert told(copy) == [("encrypted", TAG, True), ("encrypted", "global_step1", True), ("loaded", TAG, True)]


def test_encrypt_says_what_it_cannot_do(copy):
    assert "give the key" in run("encrypt", copy).output
    assert run("encrypt", copy, "--tag", TAG, *WITH_KEY).exit_code == 0
    done = run("encrypt", copy, "--tag", TAG, *WITH_KEY)
    assert done.exit_code == 1 and "encrypted already" in done.output
    done = run("encrypt", copy, "--key-env", "OTHER_KEY")  # of the other checkpoint: the log has this key
    assert done.exit_code == 1 and "does not hold the key of the audit log" in done.output
    assert find(copy, "global_step1").manifest.encryption is None
    assert run("encrypt", copy, *WITH_KEY).exit_code == 0
    assert "all checkpoints are encrypted already" in run("encrypt", copy, *WITH_KEY).output


def test_what_is_damaged_is_not_encrypted(copy):
    path = copy / TAG / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run("encrypt", copy, "--tag", TAG, *WITH_KEY)
    assert done.exit_code == 1 and "not the bytes that were saved" in done.output
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize("chunks", range(0, 8, 2))
def test_a_kill_leaves_the_plain_one(copy, chunks):
    """After some chunks; the next call does it."""
    child = os.fork()
    if child == 0:
        for number, _ in enumerate(encrypt(find(copy, TAG), parse_key(KEY, "the key"))):
            if number == chunks:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    assert find(copy, TAG).manifest.encryption is None
    assert run("verify", copy, "--tag", TAG).exit_code == 0
    assert run("encrypt", copy, *WITH_KEY).exit_code == 0
    assert run("verify", copy, "--tag", TAG, *WITH_KEY).exit_code == 0


def test_the_log_says_what_was_pruned(copy, tmp_path):
    """By the command, and by a run."""
    assert run("encrypt", copy, *WITH_KEY).exit_code == 0
    assert run("prune", copy, "--keep", 1, *WITH_KEY).exit_code == 0
    assert told(copy)[-1] == ("pruned", "global_step1", True)
    engine = engine_for(sealed_config(dir=str(tmp_path / "run"), interval_steps=1, keep_last=1), seed=1)
    take_steps(engine, 2)
    engine.destroy()
    assert told(tmp_path / "run")[-1] == ("pruned", "global_step1", True)


def test_what_is_refused_makes_no_log(copy):
    """The key may be a wrong one; who saves first gives the log its key."""
    assert "not encrypted" in run("verify", copy, *WITH_KEY).output
    assert "not encrypted" in run("export", copy, copy / "out.safetensors", *WITH_KEY).output
    assert not audit.has_log(copy)


def test_the_log_says_what_was_refused(copy):
    assert run("encrypt", copy, *WITH_KEY).exit_code == 0
    manifest = copy / TAG / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    for command in (("verify", copy), ("export", copy, copy / "out.safetensors")):
        assert "was changed after it was saved" in run(*command, *WITH_KEY).output
        lines = (copy / audit.LOG).read_text().splitlines()
        assert json.loads(lines[-1])["what"] == "refused"
    assert len(lines) == 4
