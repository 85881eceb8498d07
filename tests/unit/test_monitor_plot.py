"""The command `partita plot`: what it draws of which files, and what it says about wrong ones."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from partita.cli.commands import app
from partita.config import load_config
from partita.monitor import Record, panels_of, read_run
from partita.monitor.build import make_sinks
from partita.monitor.panels import smoothed
from partita.monitor.writer import RecordWriter
from recorded import JOB, everywhere
from typer.testing import CliRunner, Result


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def recorded(folder: Path, steps: int = 40, **more: float) -> Path:
    """A run whose loss falls, as its sinks write it."""
    writer = RecordWriter(make_sinks(load_config(everywhere(folder))))
    writer.go_on_from(0, 0)
    for step in range(1, steps + 1):
        values = {"loss": 4.0 / step, "loss_scale": 8.0, "samples_per_s": 100.0, **more}
        writer.put(Record(step, 8 * step, values))
        if step % 10 == 0:
            writer.put(Record(step, 8 * step, {"val_loss": 5.0 / step, "accuracy": 0.5}, is_own=False))
    writer.close()
    return folder


def test_a_run_reads_the_same_from_its_rows_and_from_its_tables(tmp_path: Path):
    recorded(tmp_path, forward_ms=3.0, update_ms=4.0, grad_norm=math.inf)
    lines, tables = read_run(tmp_path), read_run(tmp_path / "tables" / JOB)
    assert lines.name == tmp_path.name and tables.name == JOB
    assert lines.series.keys() == tables.series.keys() >= {"loss", "val_loss", "update_ms", "accuracy"}
    assert "grad_norm" not in lines.series  # nothing that could be drawn
    for name, series in lines.series.items():
        assert (series.samples, series.values) == (tables.series[name].samples, tables.series[name].values)
        assert series.steps == [x // 8 for x in series.samples] and tables.series[name].steps is None


def test_panels_have_a_curve_for_each_run_and_for_each_other_loss(tmp_path: Path):
    words = read_run(recorded(tmp_path / "words", tokens_per_s=5e4, waited_share=0.1))
    pictures = read_run(recorded(tmp_path / "pictures"))
    loss, rate, waited = panels_of([words], None, None)
    assert [curve.name for curve in loss.curves] == ["loss (train)", "val_loss"]
    assert loss.curves[1].smooth is None and loss.curves[1].x == [10, 20, 30, 40]
    assert (rate.label, waited.label, waited.curves[0].y[0]) == ("tokens per second", "time waited, %", 10.0)
    loss, rate, waited = panels_of([words, pictures], None, None)
    assert [(c.name, c.run) for c in loss.curves] == [
        ("words, train", 0),
        ("words, val_loss", 0),
        ("pictures, train", 1),
        ("pictures, val_loss", 1),
    ]
    assert (rate.label, len(rate.curves), len(waited.curves)) == ("samples per second", 2, 1)
    by_samples, *_ = panels_of([words, read_run(tmp_path / "pictures" / "tables" / JOB)], None, None)
    assert by_samples.curves[0].x[:2] == [8, 16]


def test_the_axis_of_the_loss_fits_its_values(tmp_path: Path):
    falls = read_run(recorded(tmp_path / "falls"))
    flat = read_run(recorded(tmp_path / "flat", loss=0.5))
    assert panels_of([falls], None, None)[0].is_log  # from 4 to 0.1
    assert not panels_of([falls], None, False)[0].is_log
    panel = panels_of([flat], None, None)[0]
    assert not panel.is_log and panel.low < 0.125 < 0.5 < panel.high  # all of val_loss, too
    assert panels_of([flat], None, True)[0].is_log


def test_a_smooth_line_is_the_mean_of_neighbours():
    assert smoothed([1.0, 2.0, 6.0, 3.0, 0.0], 3) == [1.5, 3.0, 11 / 3, 3.0, 1.5]
    assert smoothed([1.0, 2.0, 6.0, 3.0, 0.0], 3, falls=True) == [1.0, 3.0, 11 / 3, 3.0, 1.5]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_written(tmp_path: Path, kind: str):
    runs = [recorded(tmp_path / name, tokens_per_s=100.0, waited_share=0.1) for name in ("one", "two")]
    picture = tmp_path / f"out.{kind}"
    said = run(*runs, "-o", picture)
    assert (said.exit_code, said.output) == (0, f"{picture}: one, two\n")
    data = picture.read_bytes()
    if kind == "png":
        assert data.startswith(b"\x89PNG") and len(data) > 20_000
    else:
        for text in ("one, train", "two, val_loss", "tokens per second", "time waited, %", "step", "loss"):
            assert f"<!-- {text} -->" in data.decode(), text


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path):
    runs = [recorded(tmp_path / name / "run") for name in ("a", "b")]
    assert run(*runs, "-o", tmp_path / "out.png").output.endswith(f"out.png: {runs[0]}, {runs[1]}\n")


def broken(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text(text)
    return path


ROW: dict[str, Any] = {"step": 1, "samples": 8}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p, "does not exist: give the folder of a run"),
        (lambda p: p.mkdir(), "has neither 'metrics.jsonl' nor"),
        (lambda p: broken(p, "no json\n{}\n"), "line 1: is no record of a step"),
        (lambda p: broken(p, '{"step": 1}\n{}\n'), "line 1: is no record of a step"),
        (lambda p: broken(p, ""), "holds no values yet"),
        (lambda p: broken(p, json.dumps(ROW | {"accuracy": 0.5})), "no run has a loss, .* only accuracy"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "cannot be read: "),
    ],
)
def test_a_path_that_is_no_run_is_one_line(tmp_path: Path, make: Any, says: str):
    make(tmp_path / "run")
    said = run(tmp_path / "run", "-o", tmp_path / "out.png")
    assert said.exit_code == 1 and len(said.output.splitlines()) == 1
    assert re.search(says, said.output)


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path):
    recorded(tmp_path, steps=3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "sam')
    assert read_run(tmp_path).series["loss"].steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "says"),
    [("out.gif", "ends in .png, .svg, .pdf"), (".", "ends in"), ("no/out.png", "no/out.png: No such file")],
)
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, name: str, says: str):
    said = run(recorded(tmp_path / "run"), "-o", tmp_path / name)
    assert said.exit_code == 1 and len(said.output.splitlines()) == 1 and says in said.output


def test_without_matplotlib_the_command_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = run(recorded(tmp_path / "run"), "-o", tmp_path / "out.png")
    assert (said.exit_code, said.output) == (1, "partita plot needs matplotlib: pip install 'partita[monitor]'\n")
