"""C1: what a pipeline has saved, any other split of the model has, bit for bit: ranks x stages, tied or not."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pairwise import pairwise
from partita.checkpoint import find, verify
from split_by_hand import (
    OPTIMIZERS,
    PRECISIONS,
    SPLITS,
    config_for,
    engine_for,
    pieces_of,
    ranks_of,
    take_steps,
    whole,
)

Case = tuple[str, int, str, int, str, str, bool]
CASES = [
    case
    for case in product(SPLITS, (0, 1, 2), SPLITS, (0, 1, 2), PRECISIONS, OPTIMIZERS, (False, True))
    if case[4:6] != ("split", "SGD")
]


# The ranks of most sessions, without those that start more.
FEW = ("plain x 2", "1 x 1, 2 chunks", "2 x 1, V", "2 x 2")


def _save(folder: str, config: dict[str, Any], split: str, tied: bool) -> Any:
    engine = engine_for(config, split, 1, tied)
    take_steps(engine, 3)
    engine.save_checkpoint(folder, "saved", client_state={"note": 7})
    engine.save_model(f"{folder}/export.safetensors")
    told = pieces_of(engine)
    engine.destroy()
    return told


def _load(folder: str, config: dict[str, Any], split: str, tied: bool) -> Any:
    engine = engine_for(config, split, 2, tied)
    before = pieces_of(engine)
    _, client = engine.load_checkpoint(folder, "saved")
    assert client == {"note": 7}
    after, steps = pieces_of(engine), engine.global_steps
    engine.destroy()
    return before, after, steps


def move(ranks: Any, folder: str, case: Case) -> None:
    source, its_stage, target, stage, precision, optimizer, tied = case
    config = config_for(source, its_stage, precision, optimizer)
    saved = whole(ranks(ranks_of(source)).run(_save, folder, config, source, tied), tied=tied)
    found = find(Path(folder), "saved")
    assert not [seen for seen in verify(found.path, found.manifest) if seen.problem]
    config = config_for(target, stage, precision, optimizer)
    told = ranks(ranks_of(target)).run(_load, folder, config, target, tied)
    assert {steps for *_, steps in told} == {3}
    loaded = whole([after for _, after, _ in told], tied=tied)
    assert loaded.keys() == saved.keys()
    assert [key for key in saved if not saved[key].equal(loaded[key])] == []
    fresh = whole([before for before, _, _ in told], tied=tied)
    assert any(not saved[key].equal(fresh[key]) for key in fresh if key.startswith("weight")), "this shows nothing"


@pytest.mark.parametrize("case", pairwise(c for c in CASES if c[0] in FEW and c[2] in FEW), ids=str)
def test_a_checkpoint_of_a_pipeline_opens_in_another_split(ranks, tmp_path, case):
    """Masters, moments of native and torch optimizers, buffers, counters; tied weights have one value everywhere."""
    move(ranks, str(tmp_path), case)


@pytest.mark.slow
def test_a_checkpoint_of_a_pipeline_opens_in_every_split(ranks, tmp_path):
    for i, case in enumerate(pairwise(CASES)):
        move(ranks, str(tmp_path / str(i)), case)
