"""Two ranks that are watched: rank 0 alone writes, what it writes is of all ranks, and all learn that it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from pipelines import Shape, config_for, micro_batch
from recorded import JOB, everywhere, own_rows, rows, scalars, table
from small_models import config
from torch import Tensor, nn

LENGTHS = ((5, 8), (3, 7))  # of the sequences of each rank, by micro-batch


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.embedding(ids)).flatten(0, 1), ids.flatten())


def _train(folder: Path, stage: int) -> list[float]:
    torch.manual_seed(0)
    settings = config(gradient_accumulation_steps=2, zero_optimization={"stage": stage}, **everywhere(folder))
    engine = partita.Engine(Words(), config=settings)
    losses = []
    for step in range(3):
        for length in LENGTHS[engine.global_rank]:
            ids = torch.full((2, length), step + engine.global_rank)
            losses.append(engine.backward(engine(ids)).item())
            engine.step()
        engine.log({"rank": engine.global_rank})
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_recorded_is_of_all_ranks_and_rank_0_writes_it(ranks, tmp_path: Path, stage: int):
    first, second = ranks(2).run(_train, tmp_path, stage)
    found = own_rows(tmp_path)
    assert [(row["step"], row["samples"]) for row in found] == [(1, 8), (2, 16), (3, 24)]
    for step, row in enumerate(found):
        both = [*first[2 * step : 2 * step + 2], *second[2 * step : 2 * step + 2]]
        assert row["loss"] == pytest.approx(sum(both) / 4)
    tokens = 2 * sum(map(sum, LENGTHS))
    for row in found[1:]:
        seconds = row["step_ms"] / 1e3
        assert 0 <= row["waited_share"] <= 1
        assert row["tokens_per_s"] * seconds == pytest.approx(tokens)
        assert row["flops_per_s"] * seconds == pytest.approx(3 * 2 * tokens * 6 * 11)
    assert [row["rank"] for row in rows(tmp_path) if "rank" in row] == [0, 0, 0]
    assert len(scalars(tmp_path / "board" / JOB)["Train/Samples/train_loss"]) == 3
    assert len(list((tmp_path / "board" / JOB).iterdir())) == 1  # no file of another rank
    assert len(table(tmp_path / "tables" / JOB, "rank")[1]) == 3


def _pipeline(folder: Path) -> list[float]:
    engine, *_ = partita.initialize(model=Shape().module(2), config=config_for(4, **everywhere(folder)))
    losses = [engine.train_batch(iter([micro_batch(s, m) for m in range(4)])).item() for s in range(3)]
    engine.log({"val_loss": 1.5})
    engine.destroy()
    return losses


def _flops_alone(folder: Path) -> None:
    engine, *_ = partita.initialize(model=Shape().module(1), config=config_for(4, **everywhere(folder)))
    for s in range(2):
        engine.train_batch(iter([micro_batch(s, m) for m in range(4)]))
    engine.destroy()


def work_of(row: dict[str, Any]) -> list[float]:
    return [row[name] * row["step_ms"] / 1e3 for name in ("tokens_per_s", "flops_per_s")]


def test_a_pipeline_records_the_work_of_all_its_stages(ranks, tmp_path: Path):
    losses = ranks(2).run(_pipeline, tmp_path / "two")[0]
    _flops_alone(tmp_path / "one")
    found = own_rows(tmp_path / "two")
    assert [row["loss"] for row in found] == pytest.approx(losses)
    assert work_of(found[1]) == pytest.approx(work_of(own_rows(tmp_path / "one")[1]))
    assert [row["val_loss"] for row in rows(tmp_path / "two") if "val_loss" in row] == [1.5]


def _refused(place: Path) -> str:
    with pytest.raises(ValueError) as caught:
        partita.Engine(Words(), config=config(monitor={"dir": str(place)}))
    return str(caught.value)


def test_a_place_that_rank_0_cannot_write_ends_all_ranks(ranks, tmp_path: Path):
    (tmp_path / "file").touch()
    for said in ranks(2).run(_refused, tmp_path / "file" / "below"):
        assert "monitor.dir: cannot be written: " in said
