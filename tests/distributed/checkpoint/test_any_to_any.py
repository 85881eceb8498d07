"""C1: what a run has saved, a run with other ranks, stage, precision, units and transport has, bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from pairwise import pairwise
from resumed import config_for, differences, engine_for, take_steps, train_and_save, whole_state

RANKS = (1, 2, 3)
STAGES = (0, 1, 2, 3)
PRECISIONS = (
    *((p, p) for p in ("fp32", "bf16", "split", "fp16")),
    *(("fp32", p) for p in ("bf16", "split", "fp16")),
    *((p, "fp32") for p in ("bf16", "split", "fp16")),
    ("bf16", "split"),
    ("split", "fp16"),
)
VARIANTS = ("plain", "SGD", "Adagrad", "offloaded", "another unit size")

Case = tuple[tuple[int, int], tuple[int, int], tuple[str, str], str]


def is_possible(case: Case) -> bool:
    _, target, precisions, variant = case
    if variant == "offloaded":
        return target[1] > 0
    return variant == "plain" or variant == "another unit size" or "split" not in precisions


PLACES = list(product(RANKS, STAGES))
EVERYTHING = [case for case in product(PLACES, PLACES, PRECISIONS, VARIANTS) if is_possible(case)]


def sample() -> list[Case]:
    """Every pair of stages, of ranks, and of each with precisions and variants."""
    flat = [(*source, *target, precisions, variant) for source, target, precisions, variant in EVERYTHING]
    return [((a, b), (c, d), precisions, variant) for a, b, c, d, precisions, variant in pairwise(flat)]


def _load(folder: str, config: dict[str, Any], optimizer: str, saved: dict[str, Any], rounds: bool) -> list[str]:
    engine = engine_for(config, seed=2)
    take_steps(engine, 1)
    another = whole_state(engine, optimizer)
    path, client_state = engine.load_checkpoint(folder)
    assert (path.name, client_state) == ("global_step3", {"note": ["kept", 2**80]})
    ours = whole_state(engine, optimizer)
    take_steps(engine, 2)
    assert engine.global_steps == 5
    engine.destroy()
    assert len(differences(another, saved)) > 10, "the two runs are the same from the start: this test shows nothing"
    return differences(ours, saved, leave_out="weight" if rounds else "")


def move(ranks: Any, folder: str, case: Case) -> None:
    source, target, precisions, variant = case
    optimizer = variant if variant in ("SGD", "Adagrad") else "AdamW"
    changes: dict[str, Any] = {"zero_offload_optimizer": {"device": "cpu"}} if variant == "offloaded" else {}
    changes |= {"bucket": 10**6} if variant == "another unit size" else {}
    config = config_for(*source, precisions[0], optimizer)
    saved = ranks(source[0]).run(train_and_save, folder, config, optimizer)[0]
    config = config_for(*target, precisions[1], optimizer, **changes)
    # What another precision computes with are the same masters, rounded otherwise.
    rounds = precisions[0] != precisions[1] and set(precisions) != {"bf16", "split"}
    for differs in ranks(target[0]).run(_load, folder, config, optimizer, saved, rounds):
        assert differs == []


@pytest.mark.parametrize("case", sample(), ids=str)
def test_a_checkpoint_opens_anywhere(ranks, tmp_path, case):
    """Weights, masters, moments of native and torch optimizers, buffers, learning rates and counters."""
    move(ranks, str(tmp_path), case)


@pytest.mark.slow
@pytest.mark.parametrize("precisions", PRECISIONS, ids=str)
def test_every_checkpoint_opens_everywhere(ranks, tmp_path, precisions):
    for i, case in enumerate(case for case in EVERYTHING if case[2] == precisions):
        move(ranks, str(tmp_path / str(i)), case)
