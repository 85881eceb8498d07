"""Gathered parameters are there when autograd asks, whatever blocks return and whichever gradients are wanted."""

from __future__ import annotations

from typing import Any

import inside
import partita
import pytest
import torch
from blocks_model import assert_same_weights
from graph_zoo import BLOCKS, WAYS, ZooModel, batch, is_possible
from torch import Tensor

SGD: dict[str, Any] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
PAIRS = [(block, way) for block in BLOCKS for way in WAYS if is_possible(block, way)]


def config_for(stage: int, transport: str, precision: str = "fp32", **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": SGD,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 70,
            "stage3_param_persistence_threshold": 0,
            **zero,
        },
        "comm": {"transport": transport, "timeout_seconds": 20},
        "steps_per_print": 0,
    }


def offloaded(precision: str = "fp32") -> dict[str, Any]:
    """One rank gathers, too, where its shards are on the host."""
    return config_for(3, "auto", precision, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})


def train(config: dict[str, Any], block: str, way: str, steps: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    engine, *_ = partita.initialize(model=ZooModel(BLOCKS[block]), config=config)
    losses = []
    for step in range(steps):
        loss = WAYS[way](engine, engine.module, batch(step, engine.global_rank))
        loss.backward()
        losses.append(loss.item())
        del loss
        engine.step()
        assert inside.gathered_bytes(engine) == 0, f"after step {step}"
    weights = engine.module_state_dict()
    engine.destroy()
    return losses, weights


def train_plain(block: str, way: str, steps: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    model = ZooModel(BLOCKS[block])
    optimizer = torch.optim.SGD(model.parameters(), **SGD["params"])
    losses = []
    for step in range(steps):
        loss = WAYS[way](model, model, batch(step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(("block", "way"), PAIRS)
def test_one_rank_that_gathers_has_the_bits_of_torch(block, way):
    """F30, F31, F32, F33, and their like."""
    expected_losses, expected = train_plain(block, way)
    losses, weights = train(offloaded(), block, way)
    assert losses == expected_losses
    assert_same_weights(weights, expected)


def _as_stage_0(pairs: list[tuple[str, str]], over: str, precision: str) -> None:
    for block, way in pairs:
        expected_losses, expected = train(config_for(0, "auto", precision), block, way)
        losses, weights = train(config_for(3, over, precision), block, way)
        assert losses == expected_losses, (block, way)
        assert_same_weights(weights, expected, f"{block} {way}")


@pytest.mark.parametrize(
    ("sample", "over", "precision"), [(0, "torch", "fp32"), (1, "torch", "bf16"), (2, "shared_memory", "fp32")]
)
def test_several_ranks_have_the_bits_of_stage_0(ranks, sample, over, precision):
    """The same, gathered and mapped; each a part of the cases."""
    ranks(2).run(_as_stage_0, PAIRS[sample::5], over, precision)


# Of the blocks, for each step and rank; every rank leaves out others.
ORDERS = [[[0, 1, 2, 3], [3]], [[0], [1, 2, 3]], [[], [0, 3]], [[0, 1], [2, 3]], [[1, 3], [0, 2]]]


def _with_orders(config: dict[str, Any], block: str) -> dict[str, Tensor]:
    engine, *_ = partita.initialize(model=ZooModel(BLOCKS[block]), config=config)
    for step, orders in enumerate(ORDERS):
        engine.module.order = orders[engine.global_rank]  # type: ignore[assignment]
        engine.backward(engine(batch(step, engine.global_rank)).square().mean())
        engine.step()
        assert inside.gathered_bytes(engine) == 0
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


def _other_blocks_on_each_rank() -> None:
    for block, overlap in (("IntoDict", True), ("InObject", False), ("InPlace", True), ("CheckpointsInside", True)):
        expected = _with_orders(config_for(0, "auto"), block)
        weights = _with_orders(config_for(3, "torch", overlap_comm=overlap), block)
        assert_same_weights(weights, expected, block)


def test_ranks_may_have_different_graphs(ranks):
    """Rules 1 to 4 of [Note: order of gathers], where nothing but saved tensors tells how far a backward has come."""
    ranks(2).run(_other_blocks_on_each_rank)
