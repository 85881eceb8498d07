"""What a ZeRO stage decides: the lifetimes of a unit's buffers (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePolicy:
    """One row of the table of stages."""

    stage: int
    shards_states: bool  # master weights and moments exist for this rank's shard only
    # The full gradient buffer outlives its reduction, to accumulate micro-batches; without, each of them is reduced.
    keeps_full_grads: bool
    reduce_scatter: bool  # each rank receives its slice of the reduced gradients only; else all of them
    shards_params: bool  # full parameters exist only while their unit computes


def stage_policy(stage: int, *, reduce_scatter: bool = True) -> StagePolicy:
    """The policy of stage 0, 1, 2 or 3."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage {stage}: there are the stages 0, 1, 2 and 3")
    sharded = stage >= 1
    return StagePolicy(
        stage=stage,
        shards_states=sharded,
        keeps_full_grads=stage <= 1,
        reduce_scatter=sharded and reduce_scatter,
        shards_params=stage == 3,
    )
