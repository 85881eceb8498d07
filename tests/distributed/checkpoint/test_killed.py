"""kill -9 at any moment of a save, of all ranks or of one: the checkpoints that there were are whole, and load."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from killed_saves import KILLS, RANKS, config_of, digests_by_step, kill_at

BEYOND = 1.25  # moments reach past the end of a save


def spread(count: int, seed: int) -> list[float]:
    """Random moments of a save, one in each of `count` parts of it, in random order."""
    rng = random.Random(seed)
    moments = [BEYOND * (i + rng.random()) / count for i in range(count)]
    rng.shuffle(moments)
    return moments


def kill(ranks: Any, transport: str, folder: Path, stage: int, precision: str, moments: list[float], seed: int) -> int:
    """Returns how many of the kills left something unfinished."""
    config = config_of(stage, precision, transport)
    first, *others = ranks(RANKS).run(digests_by_step, config)
    assert others == [first] and len(set(first)) == len(first)
    chain = kill_at(moments, folder, config, first, seed)
    print(f"{len(moments)} kills, {chain.left_behind} left something")
    assert chain.wrong == []
    return chain.left_behind


def test_a_killed_save_costs_no_checkpoint(ranks, transport, tmp_path):
    """The next run loads the latest checkpoint bit for bit, and its first save leaves nothing of the dead one."""
    kill(ranks, transport, tmp_path, 2, "split", spread(6, seed=1), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "split"), (2, "bf16"), (3, "split"), (3, "fp16")])
def test_200_killed_saves_cost_no_checkpoint(ranks, transport, tmp_path, stage, precision):
    """Five times 40."""
    chains = 40 // KILLS
    moments = spread(40, seed=stage)
    left = [
        kill(ranks, transport, tmp_path / str(i), stage, precision, moments[i * KILLS : (i + 1) * KILLS], seed=i)
        for i in range(chains)
    ]
    assert sum(left) >= 4, "hardly any kill came during a save: this test shows little"
