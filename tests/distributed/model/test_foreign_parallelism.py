"""F20: models that another library has partitioned already are refused by name, on all ranks, before a collective."""

from __future__ import annotations

from typing import Any

import partita
import torch
from blocks_model import config_for, error_of, make_blocks, run_steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module


def _is_refused(transport: str) -> list[str]:
    said = []
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for stage in (0, 3):
        sharded = make_blocks()
        fully_shard(sharded.body, mesh=mesh)
        split = make_blocks()
        parallelize_module(split.body.blocks[0].back, mesh, ColwiseParallel())
        frozen = make_blocks()
        parallelize_module(frozen.body.blocks[0].back, mesh, ColwiseParallel())
        frozen.body.blocks[0].requires_grad_(False)
        buffered = make_blocks()
        buffered.register_buffer("adjacency", torch.eye(3).to_sparse())
        for model in (sharded, split, frozen, buffered):
            config: dict[str, Any] = config_for(stage, transport)
            kind = TypeError if model is sharded else ValueError
            said.append(error_of(lambda m=model, c=config: partita.Engine(model=m, config=c), kind))
    run_steps(make_blocks(), config_for(3, transport), steps=1)  # and nothing is left of the refused ones
    return said


def test_what_others_have_partitioned_is_named(ranks):
    """DTensors of fully_shard() and tensor parallelism, trained or frozen, and buffers that cannot be broadcast."""
    for errors in ranks(2).run(_is_refused, "auto"):
        for sharded, split, frozen, buffered in (errors[:4], errors[4:]):
            assert "'body'" in sharded and "fully_shard()" in sharded
            for error in (split, frozen):
                assert "parameter 'body.blocks.0.back.weight' is a DTensor" in error
            assert "buffer 'adjacency' has the layout torch.sparse_coo" in buffered
