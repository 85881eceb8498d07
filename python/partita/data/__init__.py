"""Rank-sharded, seeded, resumable data loading, and how a batch enters a model."""

from partita.data.batches import Reading, call_with, loss_in, micro_batches, on_device
from partita.data.loader import ShardedLoader
from partita.data.loading import Loading, loading_of, sharded_loader
from partita.data.repeating import RepeatingLoader
from partita.data.sampler import ShardedSampler, Sharding

__all__ = [
    "Loading",
    "Reading",
    "RepeatingLoader",
    "ShardedLoader",
    "ShardedSampler",
    "Sharding",
    "call_with",
    "loading_of",
    "loss_in",
    "micro_batches",
    "on_device",
    "sharded_loader",
]
