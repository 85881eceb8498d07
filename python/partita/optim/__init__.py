"""Optimizers, loss scaling and learning-rate schedules."""

from partita.optim.build import make_optimizer
from partita.optim.choose import (
    OptimizerSource,
    SchedulerSource,
    choose_optimizer,
    choose_scheduler,
    decided_config,
    require_buildable,
)
from partita.optim.fused_adam import FusedAdam
from partita.optim.groups import StepDigest, group_entries
from partita.optim.schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    make_scheduler,
)
from partita.optim.sharded import HyperParameters, ShardedOptimizer, kept_groups, require_supported
from partita.optim.sharded_step import ShardedStep
from partita.optim.step_control import PendingOutcome, StepController, StepOutcome, Wishes

__all__ = [
    "FusedAdam",
    "HyperParameters",
    "LRRangeTest",
    "OneCycle",
    "OptimizerSource",
    "PendingOutcome",
    "SchedulerSource",
    "ShardedOptimizer",
    "ShardedStep",
    "StepController",
    "StepDigest",
    "StepOutcome",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "Wishes",
    "choose_optimizer",
    "choose_scheduler",
    "decided_config",
    "group_entries",
    "kept_groups",
    "make_optimizer",
    "make_scheduler",
    "require_buildable",
    "require_supported",
]
