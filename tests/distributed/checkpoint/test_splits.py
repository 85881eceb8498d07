"""C1: what a pipeline has saved, any other split of the model has, bit for bit: ranks x stages, tied or not."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pairwise import pairwise
from partita.checkpoint import find, verify
from splits import OPTIMIZERS, PRECISIONS, SPLITS, config_for, counts_of, engine_for, pieces_of, take_steps, whole

Case = tuple[str, int, str, int, str, str, bool]
CASES: list[Case] = [
    case
    for case in product(SPLITS, (0, 1, 2), SPLITS, (0, 1, 2), PRECISIONS, OPTIMIZERS, (False, True))
    if case[4:6] != ("split", "SGD") and (SPLITS[case[0]].pipe or SPLITS[case[2]].pipe)
]
FEW = ("plain x 2", "1 x 1, 2 chunks", "2 x 1, V", "2 x 2")
STEPS = 3


def _save(folder: str, config: dict[str, Any], split: str, tied: bool) -> Any:
    engine = engine_for(config, split, 1, tied)
    take_steps(engine, STEPS)
    engine.save_checkpoint(folder, "saved", client_state={"note": 7})
    pieces, counts = pieces_of(engine), counts_of(engine)
    losses = take_steps(engine, 2)
    engine.destroy()
    return pieces, counts, losses


def _load(folder: str, config: dict[str, Any], split: str, tied: bool) -> Any:
    engine = engine_for(config, split, 2, tied)
    take_steps(engine, 1)
    before = pieces_of(engine)
    _, client = engine.load_checkpoint(folder, "saved")
    assert client == {"note": 7}
    pieces, counts = pieces_of(engine), counts_of(engine)
    losses = take_steps(engine, 2)
    engine.destroy()
    return before, pieces, counts, losses


def mean_losses(split: str, by_rank: list[list[float]]) -> list[float]:
    """Those of all copies of the model: a plain engine gives those of its rank."""
    one_each = by_rank if not SPLITS[split].pipe else by_rank[:1]
    return [sum(losses) / len(losses) for losses in zip(*one_each, strict=True)]


def move(ranks: Any, folder: str, case: Case) -> None:
    source, its_stage, target, stage, precision, optimizer, tied = case
    config = config_for(source, its_stage, precision, optimizer)
    told = ranks(SPLITS[source].ranks).run(_save, folder, config, source, tied)
    saved, expected = whole([pieces for pieces, *_ in told], tied=tied), told[0][1]
    losses = mean_losses(source, [one[2] for one in told])
    found = find(Path(folder), "saved")
    assert not [seen for seen in verify(found.path, found.manifest) if seen.problem]

    config = config_for(target, stage, precision, optimizer)
    told = ranks(SPLITS[target].ranks).run(_load, folder, config, target, tied)
    loaded = whole([pieces for _, pieces, *_ in told], tied=tied)
    assert loaded.keys() == saved.keys()
    assert [key for key in saved if not saved[key].equal(loaded[key])] == []
    assert [counts for *_, counts, _ in told] == [expected] * len(told)
    fresh = whole([before for before, *_ in told], tied=tied)
    assert sum(not saved[key].equal(fresh[key]) for key in fresh) > 10, "the runs are the same: this shows nothing"
    # Sums of other copies, and of tied gradients, have another order.
    next_losses = mean_losses(target, [one[3] for one in told])
    assert next_losses == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 2e-2)
    if SPLITS[source].pipe and SPLITS[target].pipe and SPLITS[source].data == SPLITS[target].data and not tied:
        assert next_losses == losses


@pytest.mark.parametrize("case", pairwise(c for c in CASES if c[0] in FEW and c[2] in FEW), ids=str)
def test_a_checkpoint_of_a_pipeline_opens_in_another_split(ranks, tmp_path, case):
    """Masters, moments of native and torch optimizers, buffers, counters, the place in the data; and it goes on."""
    move(ranks, str(tmp_path), case)


@pytest.mark.slow
def test_a_checkpoint_of_a_pipeline_opens_in_every_split(ranks, tmp_path):
    for i, case in enumerate(pairwise(CASES)):
        move(ranks, str(tmp_path / str(i)), case)
