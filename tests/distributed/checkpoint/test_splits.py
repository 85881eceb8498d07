"""C1: what a pipeline has saved, any other split of the model has, bit for bit: ranks x stages, tied or not."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from pairwise import pairwise
from partita.checkpoint import find, verify
from split_by_hand import SAMPLES, WIDTH, SplitEngine, pieces_of, sequential, whole

# The rank of each stage, and the data ranks. None: a plain engine has the whole model.
SPLITS: dict[str, tuple[tuple[int, ...] | None, int]] = {
    "plain x 1": (None, 1),
    "plain x 2": (None, 2),
    "1 x 1": ((0,), 1),
    "1 x 1, 2 chunks": ((0, 0), 1),
    "2 x 1": ((0, 1), 1),
    "2 x 1, 2 chunks": ((0, 1, 0, 1), 1),
    "2 x 1, V": ((0, 1, 1, 0), 1),
    "1 x 2": ((0,), 2),
    "2 x 2": ((0, 1), 2),
    "3 x 1": ((0, 1, 2), 1),
    "4 x 1": ((0, 1, 2, 3), 1),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "split": {"bf16": {"enabled": True, "master_weights": "split"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
}
Case = tuple[str, int, str, int, str, str, bool]
CASES = [
    case
    for case in product(SPLITS, (0, 1, 2), SPLITS, (0, 1, 2), PRECISIONS, OPTIMIZERS, (False, True))
    if case[4:6] != ("split", "SGD")
]


def ranks_of(split: str) -> int:
    stages, data = SPLITS[split]
    return data * (1 + max(stages or (0,)))


def config_for(split: str, stage: int, precision: str, optimizer: str) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // SPLITS[split][1],
        "optimizer": OPTIMIZERS[optimizer],
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1500},
        "steps_per_print": 0,
        **PRECISIONS[precision],
    }


def engine_for(config: dict[str, Any], split: str, seed: int, tied: bool) -> Any:
    stages = SPLITS[split][0]
    if stages is None:
        return partita.Engine(sequential(seed, tied=tied), config=config)
    return SplitEngine(config, stages, seed, tied=tied)


def take_steps(engine: Any, steps: int) -> None:
    if isinstance(engine, SplitEngine):
        engine.take_steps(steps)
        return
    for _ in range(steps):
        x = torch.randn(SAMPLES, WIDTH).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


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


@pytest.mark.parametrize("case", pairwise(CASES), ids=str)
def test_a_checkpoint_of_a_pipeline_opens_in_any_other_split(ranks, tmp_path, case):
    move(ranks, str(tmp_path), case)
