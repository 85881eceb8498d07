"""The command `partita schedule`: table, picture and proof of a schedule; files are written; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from partita.cli.commands import app
from partita.pipeline import by_name, from_text
from typer.testing import CliRunner, Result


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["schedule", *map(str, arguments)])


def test_a_schedule_is_shown():
    said = run("--stages", 4, "--micro-batches", 8, "--schedule", "zb-h1")
    assert said.exit_code == 0
    assert "0 FFFF...IWFIWFIWFIWFIWIWIWIW" in said.output
    assert "time 27, bubble 11.1%" in said.output
    assert "96 actions, each once; no deadlock" in said.output


def test_files_are_written_and_read(tmp_path: Path):
    names = [tmp_path / f"out.{suffix}" for suffix in ("txt", "csv", "svg", "png")]
    arguments = [argument for name in names for argument in ("-o", name)]
    said = run("--stages", 2, "--micro-batches", 4, "--schedule", "zb-v", *arguments)
    assert said.exit_code == 0 and all(name.stat().st_size > 50 for name in names)
    for name in names[:2]:
        assert from_text(name.read_text()) == by_name("zb-v", 2, 4)
        again = run("--schedule", name)
        assert again.exit_code == 0 and "bubble 4.0%" in again.output


def test_costs_come_from_a_file_and_memory_bounds_the_best(tmp_path: Path):
    costs = {
        "forward": [1, 3],
        "backward_input": [1, 3],
        "backward_weight": [1, 3],
        "activation_bytes": [10, 10],
        "weight_bytes": [5, 5],
        "latency": 0.5,
    }
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    given = ("--stages", 2, "--micro-batches", 4, "--costs", tmp_path / "costs.json", "--schedule", "auto")
    said = run(*given, "--memory", 20)
    assert said.exit_code == 0 and "is stage 1, which is the one to shrink" in said.output
    said = run(*given, "--memory", 5)
    assert said.exit_code == 1 and "no schedule fits" in said.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--schedule", "1f1"], "give --stages and --micro-batches"),
        (["--stages", 2, "--micro-batches", 4, "--schedule", "1f1"], "did you mean '1f1b'"),
        (["--schedule", "/nowhere/it.txt"], "No such file"),
        (["--stages", 2, "--micro-batches", 4, "--times", "1,2"], "give three numbers"),
        (["--stages", 2, "--micro-batches", 4, "--schedule", "auto"], "give --memory"),
        (["--stages", 2, "--micro-batches", 4, "-o", "it.doc"], "a picture's name ends with"),
        (["--stages", 2, "--micro-batches", 4, "-o", "/tmp"], "ends with"),
        (["--stages", 2, "--micro-batches", 4, "--costs", "/dev/null"], "has no costs"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    said = run(*arguments)
    assert said.exit_code == 1
    assert message in said.output and "Traceback" not in said.output


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"forward": ["1", "x"]}, "forward.1: Input should be a valid number"),
        ({"forwards": [1, 1]}, "has 'forwards', which is none of forward, backward_input"),
        ({"forward": [1]}, "forward has 1 values, and the schedule 2 stages"),
    ],
)
def test_costs_that_are_none_are_named(changes, message, tmp_path: Path):
    costs = {"forward": [1, 1], "backward_input": [1, 1], "backward_weight": [1, 1], **changes}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    said = run("--stages", 2, "--micro-batches", 4, "--costs", tmp_path / "costs.json")
    assert said.exit_code == 1 and message in said.output


def test_a_deadlock_in_a_file_is_drawn(tmp_path: Path):
    (tmp_path / "it.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    said = run("--schedule", tmp_path / "it.csv")
    assert said.exit_code == 1
    assert "deadlock, ranks 0 -> 1 -> 0" in said.output
