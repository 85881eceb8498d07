"""Rank-sharded, seeded, resumable data loading."""

from partita.data.loader import ShardedLoader
from partita.data.sampler import ShardedSampler

__all__ = ["ShardedLoader", "ShardedSampler"]
