"""What watches a run of several ranks: one trace of all of them, what collectives carry, memory, whole parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import partita
import pipelines
import pytest
import small_models
import torch
from partita.comm import Observed
from partita.monitor import CommsRow

STEPS = 3


def _watched(directory: str, stage: int, carrier: str, watches: bool = True) -> Any:
    watching = {
        "comms_logger": {"enabled": True},
        "trace": {"steps": [2, 3], "path": f"{directory}/trace.json"},
        "flops_profiler": {"enabled": True, "output_file": f"{directory}/flops.txt"},
        "memory_breakdown": True,
    }
    config = small_models.config(
        zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0},
        comm={"transport": carrier},
        **(watching if watches else {}),
    )
    engine, *_ = partita.initialize(model=small_models.seeded(), config=config)
    losses = []
    for step in range(STEPS):
        loss = engine(small_models.inputs(step + 10 * engine.global_rank, 2))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = {name: value.clone() for name, value in engine.module_state_dict().items()}
    rows = engine.log_comms() if watches else []
    engine.destroy()
    return losses, weights, rows


@pytest.mark.parametrize(("stage", "carrier"), [(0, "auto"), (2, "torch"), (3, "torch"), (3, "auto")])
def test_watching_changes_nothing_and_tells_all(ranks, tmp_path, stage, carrier):
    watched = ranks(2).run(_watched, str(tmp_path), stage, carrier)
    plain = ranks(2).run(_watched, str(tmp_path), stage, carrier, False)
    for (losses, weights, _), (same_losses, same_weights, _) in zip(watched, plain, strict=True):
        assert losses == same_losses
        small_models.assert_same_weights(weights, same_weights)
    _assert_rows([rows for _, _, rows in watched], stage, carrier)
    _assert_trace(tmp_path / "trace.json", {0: 2, 1: 2})
    model = (tmp_path / "flops.txt").read_text().partition("\n\n")[2].splitlines()[1].split()
    assert model[2] == "31"  # all parameters, wherever they are


def _assert_rows(by_rank: list[list[CommsRow]], stage: int, carrier: str) -> None:
    names = {row.operation.partition(" ")[0] for row in by_rank[0]}
    assert {"all_reduce"} | ({"reduce_scatter"} if stage else set()) <= names
    if (stage, carrier) == (3, "torch"):
        assert any(row.operation == "all_gather (beside)" for row in by_rank[0])
    sums = [row for row in by_rank[0] if row.count >= STEPS and row.operation == "all_reduce (world)"]
    assert sums and all(row.nbytes > 0 and row.seconds >= row.held_up_s >= 0.0 for row in sums)
    assert [{(r.operation, r.nbytes, r.count) for r in rows} for rows in by_rank] == [
        {(r.operation, r.nbytes, r.count) for r in by_rank[0]}
    ] * 2


def _assert_trace(path: Path, steps_of: dict[int, int]) -> dict[str, list[dict[str, Any]]]:
    """Both ranks are there, on one clock: every collective of one overlaps that of the other. Returns spans by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        by_kind.setdefault(event.get("cat", ""), []).append(event)
    assert {rank: sum(e["pid"] == rank for e in by_kind["step"]) for rank in steps_of} == steps_of
    of_rank = [[e for e in by_kind["collective"] if e["pid"] == rank] for rank in steps_of]
    assert of_rank[0] and [e["name"] for e in of_rank[0]] == [e["name"] for e in of_rank[1]]
    for mine, theirs in zip(*of_rank, strict=True):
        if mine["name"].startswith(("all_reduce", "reduce_scatter")):  # nobody has a sum before all have come
            assert mine["ts"] <= theirs["ts"] + theirs["dur"] and theirs["ts"] <= mine["ts"] + mine["dur"]
        assert mine["args"]["bytes"] == theirs["args"]["bytes"]
    waits = [e for e in by_kind["wait"] if e["pid"] == 0]
    assert len(waits) == len(of_rank[0]) and all(e["name"].startswith("wait for ") for e in waits)
    return by_kind


def _pipeline(directory: str) -> list[CommsRow]:
    config = pipelines.config_for(
        4,
        trace={"steps": [2, 2], "path": f"{directory}/trace.json"},
        comms_logger={"enabled": True, "debug": True},
        pipeline={"activation_checkpoint_interval": 1},  # what backward computes again is no part of the FLOPs
    )
    config["flops_profiler"] = {"enabled": True, "output_file": f"{directory}/flops.txt"}
    engine, *_ = partita.initialize(model=pipelines.Shape(blocks=2).module(2), config=config)
    for step in range(STEPS):
        engine.train_batch(iter([pipelines.micro_batch(step, m) for m in range(4)]))
    rows = engine.log_comms()
    engine.destroy()
    return rows


def test_a_pipeline_has_actions_and_messages(ranks, tmp_path):
    by_rank = ranks(2).run(_pipeline, str(tmp_path))
    for rows in by_rank:
        names = {row.operation for row in rows}
        assert {"send (pipe) in train_batch()", "recv (pipe) in train_batch()"} <= names
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for stage in (0, 1):
        actions = [e["name"] for e in events if e.get("cat") == "action" and e["pid"] == stage]
        assert sorted(actions) == sorted(f"{stage}{kind}{m}" for kind in "FB" for m in range(4))
    text = (tmp_path / "flops.txt").read_text()
    # Rank 0 has the embedding and the first of the two blocks; the micro-batches have 3 x 5 words.
    macs = 3 * 5 * 2 * pipelines.WIDTH * 2 * pipelines.WIDTH
    assert f"forward {macs / 1000:.4g} kMACs" in text


def _bad_path(directory: str) -> str:
    config = small_models.config(trace={"steps": [1, 2], "path": directory})
    try:
        partita.initialize(model=small_models.seeded(), config=config)
    except ValueError as error:
        return str(error)
    return ""


def test_a_path_that_rank_0_cannot_write_is_an_error_on_all_ranks(ranks, tmp_path):
    first, second = ranks(2).run(_bad_path, str(tmp_path))
    assert "trace.path" in first and "is a folder" in first
    assert "rank 0" in second and "trace.path" in second


def _kinds(watches: bool) -> list[bool]:
    config = small_models.config(comms_logger={"enabled": watches})
    from contextlib import ExitStack

    from partita.run import begin_run

    with ExitStack() as exits:
        grid = begin_run(config, torch.device("cpu"), exits).grid
        return [isinstance(each, Observed) for each in (grid.world, grid.data, grid.beside_data())]


def test_communicators_are_as_they_were_where_nobody_asks(ranks):
    assert ranks(2).run(_kinds, False)[0] == [False] * 3
    assert ranks(2).run(_kinds, True)[0] == [True] * 3
