"""DeepSpeed's calls on two ranks: messages of some ranks, a pipeline by its topology, weights of a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import partita.compat.deepspeed as deepspeed
import pytest
import torch
from partita.compat.deepspeed.pipe import LayerSpec, PipelineModule
from partita.compat.deepspeed.runtime.pipe import PipeDataParallelTopology
from surface import exercises
from torch import nn

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@exercises("comm.", "send recv")
def tell() -> tuple[list[str], float]:
    """What is logged on this rank, and what it gets from the other one."""
    heard = Heard()
    deepspeed.logger.addHandler(heard)
    try:
        deepspeed.log_dist("of rank 1", ranks=[1], level=logging.WARNING)
        deepspeed.log_dist("of all", ranks=[-1], level=logging.WARNING)
        deepspeed.log_dist("of nobody", level=logging.WARNING)
    finally:
        deepspeed.logger.removeHandler(heard)
    rank = deepspeed.comm.get_rank()
    own, other = torch.tensor([rank + 1.0]), torch.zeros(1)
    for turn in range(2):
        deepspeed.comm.send(own, 1 - rank) if turn == rank else deepspeed.comm.recv(other, 1 - rank)
    return heard.messages, other.item()


def test_messages_and_values_between_ranks(ranks):
    assert ranks(2).run(tell) == [(["[Rank 0] of all"], 2.0), (["[Rank 1] of rank 1", "[Rank 1] of all"], 1.0)]


def train_a_pipeline() -> dict[str, Any]:
    torch.manual_seed(0)
    layers = [LayerSpec(nn.Linear, 3, 4), nn.ReLU(), LayerSpec(nn.Linear, 4, 1)]
    model = PipelineModule(layers, topology=PipeDataParallelTopology(num_pp=2, num_dp=1), loss_fn=nn.MSELoss())
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 2, **ADAM}
    engine = deepspeed.initialize(model=model, config=config)[0]
    samples = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
    losses = [engine.train_batch(iter(samples)).item() for _ in range(4)]
    with pytest.raises(RuntimeError, match="2 stages"):
        model.forward(torch.ones(2, 3))
    said = {
        "losses": losses,
        "stage": engine.get_pipeline_parallel_rank(),
        "ends": (engine.is_first_stage(), engine.is_last_stage()),
        "copies": (engine.dp_world_size, engine.get_data_parallel_rank()),
        "stages": engine.module.topology().get_dim("pipe"),
    }
    engine.destroy()
    return said


def test_a_pipeline_by_its_topology(ranks):
    first, second = ranks(2).run(train_a_pipeline)
    assert first["losses"] == second["losses"] and first["losses"][-1] < first["losses"][0]
    assert (first["stage"], second["stage"]) == (0, 1)
    assert (first["ends"], second["ends"]) == ((True, False), (False, True))
    assert first["copies"] == second["copies"] == (1, 0) and first["stages"] == 2


def save_and_read(folder: str, stage: int) -> bool:
    """Whether the checkpoint of a bfloat16 run has the float32 masters."""
    torch.manual_seed(0)
    config = {"train_batch_size": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, **ADAM}
    model = nn.Linear(33, 7)
    engine = deepspeed.initialize(model=model, config=config)[0]
    for step in range(2):
        engine.backward(engine(torch.full((2, 33), step + 1.0, dtype=torch.bfloat16)).float().square().mean())
        engine.step()
    engine.save_checkpoint(folder)
    masters = {name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in model.named_parameters()}
    deepspeed.comm.barrier()
    read = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
    engine.destroy()
    return read.keys() == masters.keys() and all(torch.equal(read[name], masters[name]) for name in read)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_float32_weights_of_a_checkpoint(ranks, tmp_path: Path, stage: int):
    assert ranks(2).run(save_and_read, str(tmp_path), stage) == [True, True]
