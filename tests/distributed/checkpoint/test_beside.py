"""Saves beside training: what is saved is the state of the call, whatever follows it, and training does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from ranks import RankPool
from resumed import config_for, differences, engine_for, take_steps
from saves_beside import CHANGES, load, save_and_change, slow_disk, train, write_by_hand

RANKS = 2


def beside(stage: int, precision: str, optimizer: str = "AdamW", **changes: Any) -> dict[str, Any]:
    """A config with saves beside training."""
    return config_for(RANKS, stage, precision, optimizer, checkpoint={"async_save": True}, **changes)


OFFLOAD = {"zero_offload_optimizer": {"device": "cpu"}}
CASES = [
    (0, "fp32", "AdamW", {}),
    (1, "bf16", "SGD", {}),
    (2, "split", "AdamW", {}),
    (3, "fp16", "AdamW", {}),
    (2, "fp16", "AdamW", OFFLOAD),
    (3, "bf16", "Adagrad", {}),
]


def require_saved(pool: RankPool, folder: Path, config: dict[str, Any], optimizer: str, change: str) -> None:
    """The checkpoint has the state of the call."""
    found = pool.run(save_and_change, str(folder), config, optimizer, change)
    assert all(under_way for _, under_way in found), "the save was over at once: this test shows nothing"
    loaded = pool.run(load, str(folder), config, optimizer)
    for (state, _), back in zip(found, loaded, strict=True):
        assert differences(state, back) == []


@pytest.mark.parametrize(("stage", "precision", "optimizer", "more"), CASES)
def test_steps_during_a_save_are_not_in_it(faulty, tmp_path, stage, precision, optimizer, more):
    require_saved(faulty, tmp_path, beside(stage, precision, optimizer, **more), optimizer, "steps")


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"steps"}))
def test_other_changes_during_a_save_are_not_in_it(faulty, tmp_path, stage, change):
    """Of masters, moments and gathered parameters, loaded weights, buffers in a forward."""
    require_saved(faulty, tmp_path, beside(stage, "split"), "AdamW", change)


@pytest.mark.parametrize(("stage", "precision"), [(0, "split"), (2, "fp32"), (3, "bf16")])
def test_training_does_not_notice(faulty, tmp_path, stage, precision):
    """Losses, norms, samples, random numbers and states are those of a run that saves nothing. Saves come faster than
    the disk takes them."""
    config = beside(stage, precision, gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=3)
    saving, alone = (faulty.run(train, str(tmp_path), config, every) for every in (1, 0))
    for a, b in zip(saving, alone, strict=True):
        assert differences(a, b) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["latest", *(f"global_step{i}" for i in range(1, 9))]
    )


@pytest.mark.parametrize("rank", range(RANKS))
def test_writes_by_hand_spoil_a_save(faulty, tmp_path, rank):
    """One error on all ranks, also for writes on one; nothing is left, and the next save works."""
    first, second = faulty.run(write_by_hand, str(tmp_path), beside(1, "bf16"), rank)
    assert first == second
    torn, after = first
    assert after == ""
    assert torn.startswith(f"the checkpoint '{tmp_path / 'torn'}' was not saved: rank {rank}: the parameter 'layers.1.")
    assert torn.endswith("call engine.wait_for_save() before you write into parameters")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "next"]


def save_on_its_own(folder: str, config: dict[str, Any]) -> tuple[list[str], list[str], int, str]:
    """What is there after each step, what is there at the end, and from which step another run goes on."""
    engine = engine_for(config, seed=1)
    seen = []
    with slow_disk(folder, 2000):
        for _ in range(6):
            take_steps(engine, 1)
            torch.distributed.barrier()
            seen.append(",".join(sorted(path.name for path in Path(folder).glob("global_step*"))))
            torch.distributed.barrier()
        engine.destroy()
    left = sorted(path.name for path in Path(folder).iterdir())
    engine = engine_for(config, seed=2)
    step = engine.global_steps
    engine.destroy()
    return seen, left, step, str(engine.resumed_from)


def test_saves_on_its_own_beside_training(faulty, tmp_path):
    """Old ones go when the new one is there; the last one is finished at the end, and goes on."""
    config = beside(2, "split")
    config["checkpoint"] = {
        "async_save": True,
        "dir": str(tmp_path),
        "interval_steps": 2,
        "keep_last": 1,
        "verify": True,
    }
    seen, left, step, path = faulty.run(save_on_its_own, str(tmp_path), config)[0]
    assert left == ["global_step6", "latest"]
    assert all(there for there in seen[4:]), "there is always one"
    assert (step, path) == (6, str(tmp_path / "global_step6"))
