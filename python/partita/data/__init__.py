"""Rank-sharded, seeded, resumable data loading, and how a batch enters a model."""

from partita.data.batches import call_with, differentiable_tensors, loss_in, micro_batches, on_device
from partita.data.loader import ShardedLoader
from partita.data.sampler import ShardedSampler

__all__ = [
    "ShardedLoader",
    "ShardedSampler",
    "call_with",
    "differentiable_tensors",
    "loss_in",
    "micro_batches",
    "on_device",
]
