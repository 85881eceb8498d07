"""The progress line on a terminal, beside messages and bars; plain lines where there is none; who is waited for."""

from __future__ import annotations

import logging
import os
import pty
import re
import sys
from collections.abc import Iterator
from typing import Any

import partita
import pytest
from partita.config import load_config
from partita.monitor import StepReport, StepWaits
from partita.monitor.pace import Pace
from partita.monitor.progress import Progress
from partita.run import ConsoleHandler
from small_models import config, inputs, seeded

logger = logging.getLogger("partita")


class Terminal:
    """A real one, as stderr; `screen()` is what a person sees on it."""

    def __init__(self) -> None:
        self._reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w")
        self._seen = ""

    def screen(self) -> list[str]:
        """The lines that are there."""
        self.stream.flush()
        os.set_blocking(self._reader, False)
        try:
            while data := os.read(self._reader, 1 << 16):
                self._seen += data.decode()
        except BlockingIOError:
            pass
        return shown(self._seen)

    def close(self) -> None:
        """Both ends."""
        self.stream.close()
        os.close(self._reader)


def shown(text: str) -> list[str]:
    """Of the codes that a terminal knows, those for the begin of a line, its erasure and the line above."""
    lines, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[2K|\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if code == "\n":
            row += 1
            column = 0
            if row == len(lines):
                lines.append("")
        elif code == "\r":
            column = 0
        elif code == "\x1b[2K":
            lines[row] = ""
        elif code == "\x1b[A":
            row -= 1
        else:
            lines[row] = lines[row].ljust(column)[:column] + code + lines[row][column + len(code) :]
            column += len(code)
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made.stream)
    handler = ConsoleHandler()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield made
    logger.propagate = True
    logger.setLevel(before)
    logger.removeHandler(handler)
    made.close()


def report(step: int, **changes: Any) -> StepReport:
    values = {"loss": 2.0, "lr": [0.1], "grad_norm": 1.0, "loss_scale": None, "skipped_steps": 0, "skipped": False}
    return StepReport(step=step, **values | changes)


def progress(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Progress:
    monkeypatch.setattr("partita.monitor.progress.REDRAW_S", 0.0)
    return Progress(load_config(settings), samples=4, peak_flops=None)


# -- on a terminal


def test_one_line_is_rewritten_and_messages_stand_above_it(terminal, monkeypatch):
    line = progress(monkeypatch)
    for step in (1, 2):
        line.report(report(step))
    assert [row[:6] for row in terminal.screen()] == ["step 2"]
    logger.info("a message")
    assert [row[:9] for row in terminal.screen()] == ["a message", "step 2  l"]
    line.report(report(3))
    assert [row[:9] for row in terminal.screen()] == ["a message", "step 3  l"]
    line.close()
    logger.info("the end")
    assert [row[:9] for row in terminal.screen()] == ["a message", "step 3  l", "the end"]


def test_a_line_is_never_longer_than_the_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress(monkeypatch).report(report(1, lr=[0.1234] * 20))
    (row,) = terminal.screen()
    assert len(row) <= 39


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, ["step 8"]),
        ({"monitor": {"progress": "line"}, "steps_per_print": 4}, ["step 8"]),
        ({"steps_per_print": 4}, ["step 4", "step 8"]),
        ({"monitor": {"progress": "lines"}, "steps_per_print": 8}, ["step 8"]),
        ({"monitor": {"progress": "line"}, "steps_per_print": 0}, ["step 8"]),
        ({"monitor": {"progress": "off"}, "steps_per_print": 4}, []),
        ({"steps_per_print": 0}, []),
    ],
)
def test_the_config_says_which_of_them(terminal, monkeypatch, settings, rows):
    line = progress(monkeypatch, **settings)
    for step in range(1, 9):
        line.report(report(step))
    assert [row[:6] for row in terminal.screen()] == rows
    assert line.is_silent == (not rows)


def test_beside_a_bar_of_tqdm_there_are_plain_lines_above_it(terminal, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    line = progress(monkeypatch)
    line.report(report(1))
    line.close()
    with tqdm.tqdm(total=100, file=terminal.stream, mininterval=0, desc="bar", ncols=40) as bar:
        for step in range(2, 21):
            line.report(report(step))
            bar.update()
    assert [re.match(r"step \d+|bar", row)[0] for row in terminal.screen()] == ["step 1", "step 10", "step 20", "bar"]


def test_an_engine_draws_and_ends_its_line(terminal, monkeypatch):
    monkeypatch.setattr("partita.monitor.progress.REDRAW_S", 0.0)
    settings = {name: value for name, value in config().items() if name != "steps_per_print"}
    engine = partita.Engine(seeded(), config=settings)
    for step in range(12):
        engine.train_batch(inputs(step))
    engine.destroy()
    logger.info("after")
    first, line, after = terminal.screen()
    assert first.startswith("ZeRO stage 0") and line.startswith("step 12  loss") and after == "after"


# -- elsewhere


def test_without_a_terminal_there_are_plain_lines(capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="partita")
    monkeypatch.setattr(logger, "handlers", [ConsoleHandler()])
    line = progress(monkeypatch, monitor={"progress": "line"})
    for step in range(1, 21):
        line.report(report(step))
    assert [row[:8] for row in capsys.readouterr().err.splitlines()] == ["step 10 ", "step 20 "]


def test_a_program_with_logging_of_its_own_gets_plain_lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="partita")
    line = progress(monkeypatch)
    for step in range(1, 21):
        line.report(report(step))
    assert [message[:8] for message in caplog.messages] == ["step 10 ", "step 20 "]


# -- what it says


def test_who_is_waited_for_is_told_over_the_steps_since_the_last_line(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="partita")
    line = progress(monkeypatch, steps_per_print=3)
    for step, waits in enumerate([(3, 0.2), (1, 0.1), (3, 0.3), (None, 0.0), (None, 0.01), (None, 0.005)], 1):
        line.report(report(step, waits=StepWaits(*waits)))
    line.report(report(7)), line.report(report(8)), line.report(report(9))
    assert [re.findall(r"waited.*", message) for message in caplog.messages] == [["waited for rank 3 20%"], [], []]


def test_the_pace_is_the_mean_of_the_steps_since_the_last_look():
    now = iter([0.0, 4.0, 4.0, 10.0, 10.0])
    pace = Pace(8, clock=lambda: next(now))
    for step in (1, 2):
        pace.add(report(step, tokens=100 * step, flops=1e3, phases_ms=[{"forward": 10.0 * step}]))
    means = pace.take()
    assert (means.seconds, means.samples_per_s, means.tokens_per_s, means.flops_per_s) == (2.0, 4.0, 75.0, 500.0)
    assert means.phases_ms == {"forward": 15.0} and means.waited_share is None
    pace.add(report(3))
    means = pace.take()
    assert (means.seconds, means.tokens_per_s, means.flops_per_s, means.phases_ms) == (6.0, None, None, {})


def test_a_run_goes_on_without_stderr_and_when_its_terminal_is_gone():
    handler = ConsoleHandler()
    handler.stream = None  # of a program that was started so
    assert not handler.can_show
    terminal = Terminal()
    handler.stream = terminal.stream
    assert handler.can_show
    handler.show("step 1")
    with open(os.devnull) as handler.stream:  # writing fails, as on a terminal that is gone
        handler.emit(logging.makeLogRecord({"msg": "a message"}))
        handler.show("step 2")
        handler.end_line()
    assert not handler.can_show
    terminal.close()
