"""C2: kill -9 at any moment of a save, of all ranks or of one: the checkpoints that there were are whole, and load."""

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


def kill(ranks: Any, folder: Path, config: dict[str, Any], moments: list[float], seed: int) -> int:
    """Returns how many of the kills left something unfinished."""
    first, *others = ranks(RANKS).run(digests_by_step, config)
    assert others == [first] and len(set(first)) == len(first)
    chain = kill_at(moments, folder, config, first, seed)
    print(f"{len(moments)} kills, {chain.left_behind} left something")
    assert chain.wrong == []
    return chain.left_behind


@pytest.mark.parametrize("beside", [False, True], ids=["blocking", "beside"])
def test_a_killed_save_costs_no_checkpoint(ranks, transport, tmp_path, beside):
    """The next run loads the latest checkpoint bit for bit, and its first save leaves nothing of the dead one."""
    kill(ranks, tmp_path, config_of(2, "split", transport, beside=beside), spread(3, seed=1), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["blocking", "beside"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "split"), (2, "bf16"), (3, "split"), (3, "fp16")])
def test_200_killed_saves_cost_no_checkpoint(ranks, transport, tmp_path, stage, precision, beside):
    """Five times 40."""
    chains = 40 // KILLS
    config = config_of(stage, precision, transport, beside=beside)
    moments = spread(40, seed=stage)
    left = [kill(ranks, tmp_path / str(i), config, moments[i * KILLS : (i + 1) * KILLS], seed=i) for i in range(chains)]
    assert sum(left) >= 4, "hardly any kill came during a save: this test shows little"
