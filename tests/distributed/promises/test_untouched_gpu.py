"""A model on the CPU, on a machine with a GPU: nothing is pinned, and no call reaches the GPU."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from blocks_model import TRANSPORTS, config_for, make_blocks
from lives import SCHEDULE, life, samples
from partita import zero
from partita.data import on_device
from pipelines import Shape, train
from pipelines import config_for as pipeline_config
from small_models import config, inputs, seeded
from untouched_gpu import untouched_gpu

HOST: dict[str, Any] = {"device": "cpu", "pin_memory": True}
LIVES: list[tuple[int, dict[str, Any]]] = [
    (0, {"checkpoint": {"async_save": True}, "scheduler": SCHEDULE, "wall_clock_breakdown": True}),
    (2, {"zero": {"offload_optimizer": HOST}, "memory_breakdown": True, "monitor": {"flops": True}}),
    (3, {"zero": {"offload_optimizer": HOST, "offload_param": HOST}, "checkpoint": {"async_save": True}}),
]
CHECKPOINTING = {"activation_checkpointing": {"enabled": True, "cpu_checkpointing": True}}


def _lives_without(folder: str, transport: str, stage: int, changes: dict[str, Any]) -> None:
    with untouched_gpu():
        life(Path(folder), make_blocks(), samples(), config_for(stage, transport, "bf16", **changes, **CHECKPOINTING))


@pytest.mark.parametrize("row", range(len(LIVES)))
def test_a_whole_life_leaves_the_gpu_alone(ranks, tmp_path, row):
    """Trained, offloaded, recomputed, saved, loaded."""
    ranks(2).run(_lives_without, str(tmp_path), TRANSPORTS[row % 2], *LIVES[row])


def _builds_without() -> None:
    with untouched_gpu():
        with zero.Init(config=config_for(3), remote_device="cpu", pin_memory=True):
            model = make_blocks()
        engine = partita.Engine(model=model, config=config_for(3, zero={"offload_optimizer": HOST}))
        engine.destroy()


def test_partitioned_building_leaves_the_gpu_alone(ranks):
    ranks(2).run(_builds_without)


def _pipelines_without() -> None:
    with untouched_gpu():
        train(lambda: Shape(tied=True).module(2), pipeline_config(4, pipeline={"schedule": "1f1b"}))


def test_pipelines_leave_the_gpu_alone(ranks):
    ranks(2).run(_pipelines_without)


def test_the_program_is_told_that_there_is_a_gpu(caplog):
    """Who forgets `model.to("cuda")` hears of it, once, and a batch stays where it is."""
    with caplog.at_level(logging.WARNING, "partita"), untouched_gpu():
        engine = partita.Engine(seeded(), config=config())
        assert on_device(inputs(), engine.device).is_cpu
        engine.train_batch(inputs())
        engine.destroy()
    assert [record.getMessage() for record in caplog.records if "model.to('cuda')" in record.getMessage()] != []


def pinned() -> torch.Tensor:
    return torch.zeros(3, dtype=torch.float32, device="cpu", pin_memory=True)


@pytest.mark.parametrize(
    "touch", [lambda: torch.cuda.current_device(), lambda: torch.cuda.Event(), lambda: inputs().pin_memory(), pinned]
)
def test_what_touches_the_gpu_is_found(touch):
    """The block above finds what it forbids, also where the error is caught."""
    error = pytest.raises(AssertionError, match=r"\['(current_device|Event|pin_memory)'\]")
    with error, untouched_gpu(), suppress(AssertionError):
        touch()
