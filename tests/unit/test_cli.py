"""The command `partita`: config check, config convert, and what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from partita.cli.commands import app
from partita.config import load_config
from typer.testing import CliRunner, Result
from warm_python import WarmPython

GOOD = """{
  "train_micro_batch_size_per_gpu": "auto",  // HF fills it in
  "bf16": {"enabled": "auto"},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "torch_adam": true}},
  "zero_optimization": {"stage": 3, "cpu_offload": true, "sub_group_size": 1e9, "reduce_bucket_size": 5e8},
}"""
BAD = (
    '{"sed": 1, "sparse_attention": {"mode": "fixed"}, "optimizer": {"type": "Adam", "params": {"weight_decay": 0.1}}}'
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["config", *arguments])


@pytest.fixture
def good(tmp_path: Path) -> str:
    (tmp_path / "good.json").write_text(GOOD)
    return str(tmp_path / "good.json")


@pytest.fixture
def bad(tmp_path: Path) -> str:
    (tmp_path / "bad.json").write_text(BAD)
    return str(tmp_path / "bad.json")


def rows(text: str) -> dict[str, list[str]]:
    """Key -> value, answer, reason, of the table's rows."""
    found: dict[str, list[str]] = {}
    last = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line[1:-1].split("│")]
        if line.startswith("│") and len(cells) == 4:
            if cells[0]:
                last = cells[0]
                found[last] = cells[1:]
            else:
                found[last] = [" ".join(filter(None, pair)) for pair in zip(found[last], cells[1:], strict=True)]
    return found


def test_check_prints_key_value_answer_and_reason(good: str) -> None:
    result = run("check", good)
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert table["bf16.enabled"] == ['"auto"', "noted", "follows the parameters of the model"]
    assert table["optimizer.params.betas"][:2] == ["[0.9, 0.95]", "works"]
    assert table["zero_optimization.cpu_offload"][:2] == ["true", "works"]
    assert table["zero_optimization.sub_group_size"][1] == "noted"
    assert [cells[1] for cells in table.values()].count("works") == 5
    assert "5 works, 5 noted, 0 refused" in result.output


def test_check_ends_with_1_if_something_is_refused(bad: str) -> None:
    result = run("check", bad)
    assert result.exit_code == 1
    table = rows(result.output)
    assert table["sed"][1:] == ["refused", "unknown key; did you mean 'seed'?"]
    assert table["sparse_attention"][:2] == ['{"mode": "fixed"}', "refused"]
    assert "L2 in torch" in table["optimizer.params.weight_decay"][2]
    assert "3 refused" in result.output


def test_nothing_in_an_unknown_section_works(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"zero_optimisation": {"stage": 1}, "seed": 1}')
    result = run("check", str(tmp_path / "a.json"))
    assert rows(result.output)["zero_optimisation"][1] == "refused"
    assert "1 works, 0 noted, 1 refused" in result.output
    assert "zero_optimisation.stage" not in result.output


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"optimizer": {"type": "SDG"}}', "did you mean 'SGD'?"),
        ('{"optimizer": {"type": "SGD", "params": {"momemtum": 1}}}', "did you mean 'momentum'?"),
        ('{"scheduler": {"type": "StepLR"}}', "StepLR needs the parameter 'step_size'"),
    ],
)
def test_check_knows_the_classes_of_torch(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "a.json").write_text(config)
    result = run("check", str(tmp_path / "a.json"))
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_convert_writes_the_clean_form(good: str, tmp_path: Path) -> None:
    written = tmp_path / "clean.json"
    assert run("convert", good, "-o", str(written)).exit_code == 0
    result = run("convert", good)
    assert json.loads(result.stdout) == json.loads(written.read_text())
    assert json.loads(written.read_text()) == {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 500_000_000},
    }
    assert load_config(written).model_dump() == load_config(good).model_dump()
    assert "noted: zero_optimization.sub_group_size" in result.stderr


def test_convert_writes_nothing_for_a_config_that_is_refused(bad: str, tmp_path: Path) -> None:
    result = run("convert", bad, "--output", str(tmp_path / "none.json"))
    assert result.exit_code == 1
    assert "sparse_attention" in result.stderr
    assert not (tmp_path / "none.json").exists()


def test_what_cannot_be_read_or_written_is_named(good: str, tmp_path: Path) -> None:
    assert "none.json: there is no such config file" in run("check", "none.json").stderr
    assert run("check", str(tmp_path)).stderr.endswith("cannot be read as a config file: Is a directory\n")
    result = run("convert", good, "-o", str(tmp_path / "no" / "folder.json"))
    assert result.exit_code == 1
    assert "folder.json: cannot be written: No such file" in result.stderr


PROGRAM = "from partita.cli import main; main()"


def test_the_command_runs_as_a_program(python: WarmPython, bad: str) -> None:
    command = [*python.command, "-c", PROGRAM, "config", "check", bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "3 refused" in done.stdout
    assert done.stderr == ""


def test_without_its_libraries_it_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['typer'] = None; " + PROGRAM
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "partita: the command line needs typer: pip install 'partita[cli]'\n"
