"""The config's comms_logger and memory_breakdown, and the table of waits: sums, rates and text."""

from __future__ import annotations

import logging
from typing import Any

import partita
import pytest
import small_models
import torch
from late_streams import LateStreams
from partita.comm import Carried, Waited, WaitRow
from partita.config import load_config
from partita.device.streams import HostStreams, Streams
from partita.monitor import WaitTable
from partita.monitor.comms_log import CommsLog, CommsRow, comms_text
from partita.monitor.waits import Waits, step_waits


def _carried(operation: str = "all_reduce", nbytes: int = 800, seconds: float = 0.5, **changes: Any) -> Carried:
    values = {"axis": "data", "call": "step()", "launched_s": 1.0, "wait_s": 1.25, "done_s": 1.0 + seconds, "ranks": 4}
    return Carried(operation=operation, nbytes=nbytes, **(values | {"marks": (1.0, 1.0 + seconds)} | changes))


def _log(streams: Streams | None = None, **section: Any) -> CommsLog:
    config = load_config({"train_batch_size": 1, "comms_logger": {"enabled": True, **section}})
    return CommsLog(config.comms_logger, streams or HostStreams(), speaks=True)


def test_operations_add_up_by_name_and_size():
    log = _log()
    for carried in (_carried(), _carried(seconds=1.5), _carried(nbytes=8), _carried("broadcast", 800)):
        log.add(carried)
    rows = log.rows()
    assert rows[0] == CommsRow("all_reduce (data)", 800, 2, 2.0, pytest.approx(0.25 + 1.25), 4)
    assert [(row.operation, row.nbytes, row.count) for row in rows[1:]] == [
        ("all_reduce (data)", 8, 1),
        ("broadcast (data)", 800, 1),
    ]


@pytest.mark.parametrize(
    ("operation", "factor"), [("all_reduce", 1.5), ("reduce_scatter", 0.75), ("all_gather", 0.75), ("send", 1.0)]
)
def test_rates_are_those_of_the_program_and_of_the_wire(operation, factor):
    log = _log()
    log.add(_carried(operation))
    (row,) = log.rows()
    assert row.algorithm_bandwidth == 1600.0
    assert row.bus_bandwidth == 1600.0 * factor
    assert operation in comms_text([row])


def test_a_choice_of_operations():
    log = _log(prof_all=False, prof_ops=["all_gather_into_tensor", "send"])
    for operation in ("all_reduce", "all_gather", "send", "barrier"):
        log.add(_carried(operation))
    assert sorted(row.operation for row in log.rows()) == ["all_gather (data)", "send (data)"]


def test_debug_tells_calls_apart_and_verbose_prints_each(caplog):
    log = _log(debug=True, verbose=True)
    with caplog.at_level(logging.INFO, "partita"):
        log.add(_carried())
        log.add(_carried(call="backward()"))
    assert len(log.rows()) == 2
    assert "all_reduce (data) in step() of 800 B: 500.000 ms" in caplog.text


@pytest.mark.parametrize("verbose", [False, True])
def test_nobody_waits_for_an_operation_that_is_under_way(caplog, verbose):
    """LateStreams refuses the time of what the device has not come to. A line comes with a later operation."""
    streams = LateStreams()
    log = _log(streams, verbose=verbose)
    with caplog.at_level(logging.INFO, "partita"):
        log.add(_carried(marks=(streams.mark(), streams.mark())))
        before = len(caplog.messages)
        streams.catch_up()
        log.add(_carried(marks=(streams.mark(), streams.mark())))
    assert (before, len(caplog.messages)) == (0, int(verbose))
    streams.catch_up()
    assert [row.count for row in log.rows()] == [2]


def test_what_was_not_asked_for_is_not_there():
    engine, *_ = partita.initialize(model=small_models.seeded(), config=small_models.config())
    with pytest.raises(RuntimeError, match=r'"comms_logger": \{"enabled": true\}'):
        engine.log_comms()
    engine.destroy()


# -- memory


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ({}, {"parameters": 4, "optimizer states": 8, "gradients": 4}),  # the parameters are the masters
        ({"bf16": {"enabled": True}}, {"parameters": 2, "masters": 4, "optimizer states": 8, "gradients": 2}),
        (
            {"bf16": {"enabled": True, "master_weights": "split"}},
            {"parameters": 2, "masters": 2, "optimizer states": 8, "gradients": 2},
        ),
    ],
)
def test_memory_is_told_by_kind(caplog, precision, expected):
    """Bytes per parameter; a buffer is a little longer than its parameters."""

    class Wide(small_models.Regression):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.nn.Linear(5, 1)
            self.wide = torch.nn.Parameter(torch.zeros(1024, 1024))

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) + self.wide.mean()

    with caplog.at_level(logging.INFO, "partita"):
        config = small_models.config(memory_breakdown=True, steps_per_print=4, **precision)
        engine, *_ = partita.initialize(model=small_models.seeded(Wide), config=config)
        for step in range(4):
            engine.backward(engine(small_models.inputs(step, 2)))
            engine.step()
        engine.destroy()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory after")]
    assert [line.split(":")[0] for line in lines] == [f"memory after step {n}" for n in (0, 1, 2, 4)]
    states = lines[-1].partition(": ")[2].partition(";")[0]
    found = {item.rsplit(" ", 2)[0]: float(item.split(" ")[-2]) for item in states.split(", ")}
    assert found == {kind: pytest.approx(mb, abs=0.11) for kind, mb in expected.items()}
    assert " MiB in use, " in lines[-1]


# -- waits


def _row(elapsed: float, *by_rank: float, unknown: float = 0.0) -> WaitRow:
    return WaitRow(elapsed, Waited(by_rank, unknown))


def test_the_slowest_rank_is_the_one_that_was_waited_for():
    table = WaitTable.of([_row(10, 0, 4, 1), _row(10, 0, 0, 0.5), _row(10, 0, 3, 0)])
    assert table.awaited_s == (0, 7, 1.5) and table.waited_s == (5, 0.5, 3)
    assert table.slowest_rank == 1
    assert table.waited_share == pytest.approx(8.5 / 30)


def test_where_nothing_tells_for_whom_the_slowest_rank_waits_least():
    table = WaitTable.of([_row(10, 0, 0, unknown=5), _row(10, 0, 0, unknown=1)])
    assert table.slowest_rank == 1
    assert "for any" in str(table)


def test_waits_that_are_noise_name_nobody():
    table = WaitTable.of([_row(10, 0, 0.001), _row(10, 0, 0)])
    assert table.slowest_rank is None
    assert "nobody waited long enough to tell" in str(table)


def test_a_table_has_a_line_for_each_rank():
    lines = str(Waits(None, WaitTable.of([_row(1, 0, 0.25), _row(1, 0, 0)]), "carrier pigeons")).splitlines()
    assert lines[0] == "the run, over carrier pigeons"
    assert lines[2].split() == ["rank", "0", "-", "250.0", "250.0", "25.0%"]
    assert lines[4] == "the slowest: rank 1; 12.5% of the time was lost to waiting"


def test_a_step_has_what_all_ranks_gave():
    found = step_waits([4.0, 0.0, 1.0, 1.0, 0.0])  # elapsed, awaited by rank, waited by rank
    assert found is not None
    assert (found.slowest_rank, found.waited_share) == (1, 0.25)
    assert step_waits([]) is None
