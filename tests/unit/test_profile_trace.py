"""The config's trace: what is in the file, which steps, and what happens to a run that ends early."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import partita
import pytest
import small_models
import torch
from partita.comm import SingleProcess
from partita.monitor.trace import COLLECTIVES, PROGRAM, Span, Trace, events_of, merged

RANK = 3


def _run(path: Path, steps: int, of: list[int], **changes: Any) -> Any:
    config = small_models.config(trace={"steps": of, "path": str(path)}, **changes)
    engine, *_ = partita.initialize(model=small_models.seeded(), config=config)
    for step in range(steps):
        engine.backward(engine(small_models.inputs(step, 2)))
        engine.step()
    return engine


def _events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == kind]


def test_the_file_has_phases_and_modules_of_its_steps_alone(tmp_path):
    path = tmp_path / "new" / "trace.json"
    engine = _run(path, 4, [2, 3])
    written = path.read_bytes()
    assert not engine.module._forward_hooks and not engine.module.first._forward_pre_hooks
    engine.backward(engine(small_models.inputs(9, 2)))
    engine.step()
    engine.destroy()
    assert path.read_bytes() == written and list(path.parent.iterdir()) == [path]
    assert [e["name"] for e in _events(path, "step")] == ["step 2", "step 3"]
    assert [e["name"] for e in _events(path, "phase")] == ["forward", "backward", "step"] * 2
    assert {e["name"] for e in _events(path, "module")} == {"Regression", "first (Linear)", "second (Linear)"}
    steps = _events(path, "step")
    assert steps[0]["ts"] + steps[0]["dur"] == pytest.approx(steps[1]["ts"], abs=1.0)
    for event in _events(path, "phase") + _events(path, "module"):
        assert any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] + 1.0 for s in steps)


def test_of_a_run_that_ends_early_there_is_what_there_is(tmp_path, caplog):
    path = tmp_path / "trace.json"
    with caplog.at_level(logging.WARNING, "partita"):
        _run(path, 2, [2, 9]).destroy()
    assert "the run ends before step 9" in caplog.text
    assert [e["name"] for e in _events(path, "step")] == ["step 2"]


def test_a_run_that_ends_before_has_no_trace(tmp_path):
    _run(tmp_path / "trace.json", 1, [5, 9]).destroy()
    assert not list(tmp_path.iterdir())


def test_a_trace_may_begin_with_an_error_in_a_module(tmp_path):
    path = tmp_path / "trace.json"
    engine = _run(path, 0, [1, 1])
    with pytest.raises(RuntimeError):
        engine(torch.ones(2, 7))
    engine.backward(engine(small_models.inputs(0, 2)))
    engine.step()
    engine.destroy()
    assert [e["name"] for e in _events(path, "phase")] == ["forward", "forward", "backward", "step"]


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({"steps": [1, 2], "path": "{folder}"}, r"trace\.path = .* cannot be written: .*is a folder"),
        ({"steps": [1, 2], "path": "{folder}/file/x.json"}, r"trace\.path = .* cannot be written"),
        ({"steps": [3, 2], "path": "x"}, r"the first step comes after the last one"),
        ({"steps": [0, 2], "path": "x"}, r"trace\.steps"),
        ({"steps": [2], "path": "x"}, r"trace\.steps"),
        ({"steps": [1, 2]}, r"trace\.path"),
        ({"path": "x"}, r"trace\.steps"),
    ],
)
def test_what_is_wrong_is_said_before_a_step(tmp_path, trace, message):
    (tmp_path / "file").write_text("")
    if "path" in trace:
        trace = trace | {"path": trace["path"].format(folder=tmp_path)}
    with pytest.raises(ValueError, match=message):
        partita.initialize(model=small_models.seeded(), config=small_models.config(trace=trace))


def test_nobody_listens_after_the_steps(tmp_path):
    listeners: list[Any] = []
    trace = Trace([2, 2], tmp_path / "trace.json", small_models.seeded(), SingleProcess(), listeners)
    trace.begin(0)
    assert not listeners
    trace.after_update(1)
    assert len(listeners) == 1
    trace.after_update(2)
    assert not listeners and [e["name"] for e in _events(tmp_path / "trace.json", "step")] == ["step 2"]


# -- pure


def _collective(begin: float, end: float) -> Span:
    return Span(COLLECTIVES, "collective", "all_reduce (world)", begin, end, {"bytes": 8})


def test_collectives_that_overlap_have_rows_of_their_own():
    spans = [_collective(0.0, 2.0), _collective(1.0, 3.0), _collective(2.0, 4.0), _collective(5.0, 6.0)]
    events = [e for e in events_of(RANK, spans) if e["ph"] == "X"]
    assert [e["tid"] for e in events] == [1, 2, 1, 1]
    assert [(e["ts"], e["dur"]) for e in events] == [(0.0, 2e6), (1e6, 2e6), (2e6, 2e6), (5e6, 1e6)]
    assert events[0]["pid"] == RANK and events[0]["args"] == {"bytes": 8}


def test_what_is_around_comes_first():
    spans = [Span(PROGRAM, "module", "inner", 1.0, 2.0), Span(PROGRAM, "phase", "forward", 1.0, 3.0)]
    assert [e["name"] for e in events_of(0, spans) if e["ph"] == "X"] == ["forward", "inner"]


def test_ranks_of_one_host_have_one_clock_and_others_are_shifted():
    told = [
        {"rank": r, "host": host, "unix_s": zero, "events": events_of(r, [Span(PROGRAM, "step", "step 1", 1.0, 2.0)])}
        for r, host, zero in [(0, "a", 100.0), (1, "a", 100.5), (2, "b", 140.0)]
    ]
    events = merged(told)["traceEvents"]
    assert [e["ts"] for e in events if e["ph"] == "X"] == [1e6, 1e6, 41e6]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0 on a", "rank 1 on a", "rank 2 on b"]


def test_a_disk_that_takes_no_file_does_not_end_the_run(tmp_path, caplog):
    folder = tmp_path / "new"
    profile = {"enabled": True, "output_file": str(folder / "table")}
    engine = _run(folder / "trace.json", 0, [1, 2], flops_profiler=profile)
    folder.rmdir()
    with caplog.at_level(logging.WARNING, "partita"):
        for step in range(3):
            engine.backward(engine(small_models.inputs(step, 2)))
            engine.step()
    engine.destroy()
    assert all(f"{name}' cannot be written; training goes on" in caplog.text for name in ("trace.json", "table"))


def test_a_name_that_no_file_can_have_is_refused_with_its_key():
    with pytest.raises(ValueError, match=r"trace.path = .* cannot be written"):
        _run(Path("a\0b"), 0, [1, 2])
