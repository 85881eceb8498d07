"""Optimizers, loss scaling and learning-rate schedules."""

from partita.optim.build import make_optimizer
from partita.optim.fused_adam import FusedAdam
from partita.optim.schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    make_scheduler,
)
from partita.optim.sharded import ShardedOptimizer, require_supported
from partita.optim.step_control import PendingOutcome, StepController

__all__ = [
    "FusedAdam",
    "LRRangeTest",
    "OneCycle",
    "PendingOutcome",
    "ShardedOptimizer",
    "StepController",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "make_optimizer",
    "make_scheduler",
    "require_supported",
]
