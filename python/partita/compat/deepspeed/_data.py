"""The order of samples in which DeepSpeed's loader goes through `training_data`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, Subset

from partita.device import HOST


def in_its_order(data: Any, collate_fn: Any, config: Mapping[str, Any], stages: int = 1) -> Any:
    """A data set as a DataLoader in DeepSpeed's order; other data as they are.

    DeepSpeed gives each rank a `DistributedSampler` and never tells that sampler of a new epoch: one permutation, of
    torch's generator with seed 0, for all epochs. Rank r takes every N-th sample, from the r-th on, of N ranks; that
    is Partita's division of a fixed order too.

    Args:
        config: with batch sizes as numbers, or nothing is done.
        stages: of a pipeline; the ranks of a pipeline see the same samples.
    """
    if isinstance(data, (DataLoader, IterableDataset)) or not hasattr(data, "__len__") or "seed" in config:
        return data
    size = micro_batch_size(config, ranks() // stages)
    if size is None or len(data) == 0:
        return data
    draws = torch.Generator(HOST).manual_seed(0)
    order = torch.randperm(len(data), generator=draws, dtype=torch.int64, device=HOST).tolist()
    drop = bool(config.get("dataloader_drop_last", False))
    return DataLoader(Subset(data, order), batch_size=size, collate_fn=collate_fn, drop_last=drop)


def micro_batch_size(config: Mapping[str, Any], replicas: int) -> int | None:
    """Samples of one forward on one rank; None: the config does not say, or not as a whole number."""
    given = config.get("train_micro_batch_size_per_gpu")
    if given is None:
        whole, accumulated = config.get("train_batch_size"), config.get("gradient_accumulation_steps", 1)
        if not isinstance(whole, int) or not isinstance(accumulated, int) or accumulated < 1 or replicas < 1:
            return None
        given = whole // (accumulated * replicas)
    return given if isinstance(given, int) and given > 0 else None


def ranks() -> int:
    """Ranks of the job, which may not have met yet."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
