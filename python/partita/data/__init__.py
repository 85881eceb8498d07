"""Rank-sharded, seeded, resumable data loading, and how a batch enters a model."""

from partita.data.batches import call_with, loss_in, micro_batches, on_device
from partita.data.loader import ShardedLoader
from partita.data.repeating import RepeatingLoader
from partita.data.sampler import ShardedSampler, Sharding

__all__ = [
    "RepeatingLoader",
    "ShardedLoader",
    "ShardedSampler",
    "Sharding",
    "call_with",
    "loss_in",
    "micro_batches",
    "on_device",
]
