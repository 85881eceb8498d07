"""How large collectives are where the config does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import inside
import partita
import pytest
from partita.config import load_config
from partita.run.buckets import default_bucket_size
from small_models import config, seeded

MIB = 2**20


@pytest.mark.parametrize(
    ("device", "ranks", "mib"),
    [
        *(("cpu", 1, 16), ("cpu", 512, 16)),
        *(("cuda", 1, 32), ("cuda", 8, 32), ("cuda", 16, 64), ("cuda", 24, 96), ("cuda", 64, 256), ("cuda", 4096, 256)),
    ],
)
def test_the_default_follows_the_device_and_the_ranks(device, ranks, mib):
    """In 16 bits. On GPUs each rank's slice has 4 MiB, until two buckets would take too much memory."""
    assert 2 * default_bucket_size(device, ranks) == mib * MIB


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (8_388_608, 8_388_608)),
        ({"reduce_bucket_size": "auto", "allgather_bucket_size": None}, (8_388_608, 8_388_608)),
        ({"reduce_bucket_size": 5e8}, (500_000_000, 8_388_608)),
        ({"reduce_bucket_size": 30, "allgather_bucket_size": 7}, (30, 7)),
    ],
)
def test_a_run_says_what_is_used(tmp_path: Path, given: dict[str, Any], expected: tuple[int, int]):
    """And the parameters are cut by the smaller one."""
    names = ("reduce_bucket_size", "allgather_bucket_size")
    engine = partita.Engine(seeded(), config=config(zero_optimization=given))
    saved = json.loads(engine.save_config(tmp_path / "config.json").read_text())["zero_optimization"]
    assert tuple(saved[name] for name in names) == expected
    assert tuple(getattr(load_config(saved_config(tmp_path)).zero_optimization, name) for name in names) == expected
    assert (len(inside.units(engine)) > 1) == (min(expected) < 31)  # the model has 31 parameters
    engine.destroy()


def saved_config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded
