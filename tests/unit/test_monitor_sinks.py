"""Sinks by themselves: what TensorBoard, CSV and JSON lines hold, after going back, and when a sink fails."""

from __future__ import annotations

import logging
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import partita.monitor.writer as writer_module
import pytest
from partita.config import ConfigError, load_config
from partita.monitor import Record, require_libraries
from partita.monitor.build import make_sinks
from partita.monitor.files import CsvSink, JsonLinesSink
from partita.monitor.services import TensorBoardSink
from partita.monitor.sink import Sink
from partita.monitor.writer import RecordWriter
from recorded import JOB, everywhere, rows, scalars, table

SAMPLES = 8  # in a step


def record(step: int, is_own: bool = True, **values: float) -> Record:
    return Record(step, SAMPLES * step, values or {"loss": 1.0 / step}, is_own, time_s=1e9 + step)


def write(sinks: Sequence[Sink], *items: Record | int) -> None:
    """Records, and steps to go on from."""
    writer = RecordWriter(sinks)
    for item in items:
        if isinstance(item, int):
            writer.go_on_from(item, SAMPLES * item)
        else:
            writer.put(item)
    writer.close()


def test_all_sinks_hold_what_was_recorded(tmp_path: Path):
    own = [record(s, loss=0.5 * s, lr=0.1, forward_ms=2.0, update_ms=3.0, step_ms=9.0) for s in (1, 2, 3)]
    write(make_sinks(load_config(everywhere(tmp_path))), 0, *own, record(3, False, **{"Eval/val loss": 7.5}))

    first, *_, last = rows(tmp_path)
    assert first == {"step": 1, "samples": 8, "time": 1e9 + 1, **own[0].values}
    assert last == {"step": 3, "samples": 24, "time": 1e9 + 3, "Eval/val loss": 7.5}

    folder = tmp_path / "tables" / JOB
    assert table(folder, "Train_Samples_train_loss") == (["step", "train_loss"], [(8, 0.5), (16, 1.0), (24, 1.5)])
    assert table(folder, "Train_Samples_elapsed_time_ms_step")[1][0] == (8, 3.0)
    assert table(folder, "Train_Samples_step_ms")[1][0] == (8, 9.0)
    assert table(folder, "Eval_val_loss") == (["step", "val loss"], [(24, 7.5)])

    shown = scalars(tmp_path / "board" / JOB)
    assert shown["Train/Samples/train_loss"] == [(8, 0.5), (16, 1.0), (24, 1.5)]
    assert shown["Train/Samples/elapsed_time_ms_forward"] == [(8, 2.0), (16, 2.0), (24, 2.0)]
    assert shown["Eval/val loss"] == [(24, 7.5)]
    assert {"Train/Samples/lr", "Train/Samples/elapsed_time_ms_step"} < shown.keys()


def test_values_that_are_not_finite_are_valid_in_every_format(tmp_path: Path):
    write(make_sinks(load_config(everywhere(tmp_path))), 0, record(1, loss=math.nan, grad_norm=math.inf))
    assert rows(tmp_path)[0] | {"loss": None, "grad_norm": None} == rows(tmp_path)[0]
    assert table(tmp_path / "tables" / JOB, "Train_Samples_grad_norm")[1] == [(8, math.inf)]
    assert math.isnan(scalars(tmp_path / "board" / JOB)["Train/Samples/train_loss"][0][1])


# -- going on


def test_after_going_back_no_step_is_there_twice(tmp_path: Path):
    """In one process, and in the next one."""
    config = load_config(everywhere(tmp_path))
    write(make_sinks(config), 0, *map(record, range(1, 7)), 4, record(5, loss=50.0), record(6, loss=60.0))
    time.sleep(1.1)  # TensorBoard orders files of a folder by the second in their names
    write(make_sinks(config), 5, record(6, loss=600.0), record(7, loss=700.0))
    expected = [(8, 1.0), (16, 0.5), (24, 1 / 3), (32, 0.25), (40, 50.0), (48, 600.0), (56, 700.0)]
    assert [(row["samples"], row["loss"]) for row in rows(tmp_path)] == expected
    assert table(tmp_path / "tables" / JOB, "Train_Samples_train_loss") == (["step", "train_loss"], expected)
    shown = scalars(tmp_path / "board" / JOB)["Train/Samples/train_loss"]
    assert shown == pytest.approx([pytest.approx(pair) for pair in expected])


def test_tables_of_the_program_in_the_same_folder_stay_as_they_are(tmp_path: Path):
    own = "name,label\na,1\n"
    (tmp_path / "labels.csv").write_text(own)
    write([CsvSink(tmp_path)], 0, record(1), record(2))
    write([CsvSink(tmp_path)], 1, record(2))
    write([CsvSink(tmp_path)], 0, record(1))
    assert (tmp_path / "labels.csv").read_text() == own


def test_a_run_that_begins_anew_keeps_what_another_one_wrote(tmp_path: Path):
    for value in (1.0, 2.0, 3.0):
        write([JsonLinesSink(tmp_path), CsvSink(tmp_path / "csv")], 0, record(1, loss=value))
    assert [rows(tmp_path / folder)[0]["loss"] for folder in ("earlier-1", "earlier-2", "")] == [1.0, 2.0, 3.0]
    assert table(tmp_path / "csv", "Train_Samples_train_loss")[1] == [(8, 3.0)]
    assert table(tmp_path / "csv" / "earlier-2", "Train_Samples_train_loss")[1] == [(8, 2.0)]


def test_a_row_that_a_crash_has_cut_off_goes(tmp_path: Path):
    write([JsonLinesSink(tmp_path), CsvSink(tmp_path)], 0, record(1), record(2), record(3))
    for name in ("metrics.jsonl", "Train_Samples_train_loss.csv"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text[:-3])
    write([JsonLinesSink(tmp_path), CsvSink(tmp_path)], 3, record(4))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4]
    assert [x for x, _ in table(tmp_path, "Train_Samples_train_loss")[1]] == [8, 16, 32]


# -- out of the way


class Blocked:
    """A sink that is held up."""

    name = "blocked"

    def __init__(self) -> None:
        self.is_free = threading.Event()
        self.written: list[Record] = []

    def go_on_from(self, step: int, samples: int) -> None:
        """Nothing to do."""

    def write(self, records: Sequence[Record]) -> None:
        self.is_free.wait()
        self.written += records

    def close(self) -> None:
        """Nothing to do."""


def test_a_sink_that_is_held_up_holds_nobody_up_and_gets_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer_module, "INTERVAL_S", 0.001)
    sink = Blocked()
    writer = RecordWriter([sink])
    for step in range(1, 1001):
        writer.put(record(step))
    assert not sink.written
    sink.is_free.set()
    writer.close()
    assert [one.step for one in sink.written] == list(range(1, 1001))


def test_a_sink_that_hangs_is_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(writer_module, "PATIENCE_S", 0.05)
    sink = Blocked()
    write([sink], record(1))
    sink.is_free.set()
    assert "monitor: blocked did not end within 0.05 s" in caplog.text


def folder_in_the_place(path: Path) -> None:
    """Nobody can write a file of this name any more."""
    path.unlink()
    path.mkdir()


def full(path: Path) -> None:
    """No byte more has room, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == resource.RLIM_INFINITY
    os.truncate(path, 1 << 30)  # sparse
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, hard))


@pytest.fixture
def room() -> Iterator[None]:
    """Gives files back their room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("spoil", [folder_in_the_place, full])
def test_a_sink_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room,
    spoil: Callable[[Path], None],
):
    monkeypatch.setattr(writer_module, "INTERVAL_S", 0.001)
    writer = RecordWriter([JsonLinesSink(tmp_path), CsvSink(tmp_path / "csv"), TensorBoardSink(tmp_path / "board")])
    writer.go_on_from(0, 0)
    writer.put(record(1))
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.001)
    spoil(tmp_path / "metrics.jsonl")
    for step in range(2, 6):
        writer.put(record(step))
        time.sleep(0.02)
    writer.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "monitor has failed and gets no more values; training goes on (" in warnings[0]
    assert len(table(tmp_path / "csv", "Train_Samples_train_loss")[1]) == 5
    assert len(scalars(tmp_path / "board")["Train/Samples/train_loss"]) == 5


def test_a_forked_child_writes_nothing_twice(tmp_path: Path):
    writer = RecordWriter([JsonLinesSink(tmp_path)])
    writer.put(record(1))
    child = os.fork()
    if not child:
        writer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == [1]


# -- what is refused at the start


LIBRARIES = {
    "tensorboard": ("tensorboard", "'partita[monitor]'"),
    "wandb": ("wandb", "wandb"),
    "comet": ("comet_ml", "comet_ml"),
}


@pytest.mark.parametrize("section", LIBRARIES)
def test_a_library_that_is_missing_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch, section: str):
    module, package = LIBRARIES[section]
    monkeypatch.setitem(sys.modules, module, None)  # what Python knows of a library that is not there
    require_libraries(load_config({section: {"enabled": False}}))
    says = f"{section}.enabled: the library '{module}' is not installed: pip install {package},"
    with pytest.raises(ConfigError, match=re.escape(says)):
        require_libraries(load_config({section: {"enabled": True}}))


@pytest.mark.parametrize("section", ["monitor.dir", "tensorboard", "csv_monitor"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, section: str):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "below")
    sections = {name: {"enabled": True, "output_path": place} for name in ("tensorboard", "csv_monitor")}
    sections["monitor.dir"] = {"dir": place}
    with pytest.raises(ConfigError, match=f"{section}: cannot be written: .*file"):
        make_sinks(load_config({section.partition(".")[0]: sections[section]}))
