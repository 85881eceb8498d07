"""What a ZeRO stage decides: the lifetimes of a unit's buffers (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Lifetime(Enum):
    """Where the full parameters of a unit are, and when."""

    ALWAYS = "on every rank, all the time"
    MAPPED = "once per host: every rank has all shards in its address space, and uses them while it computes"
    GATHERED = "on every rank while their module computes, gathered from the shards"


@dataclass(frozen=True)
class Offload:
    """What is kept on the host while the model computes on its device. On the CPU that is the same memory; the copies
    are made all the same.

    states: the share of the elements whose masters, moments and reduced gradients are on the host. params: the shards
    of GATHERED parameters, too. pin: in pinned memory, as only the model on a GPU needs it.
    """

    states: float = 0.0
    params: bool = False
    pin: bool = False


RESIDENT = Offload()


@dataclass(frozen=True)
class StagePolicy:
    """One row of the table of stages."""

    stage: int
    shards_states: bool  # master weights and moments exist for this rank's shard only
    # The full gradient buffer outlives its reduction, to accumulate micro-batches; without, each of them is reduced.
    keeps_full_grads: bool
    reduce_scatter: bool  # each rank receives its slice of the reduced gradients only; else all of them
    shards_params: bool  # full parameters exist only while their unit computes

    def lifetime(self, *, world_size: int, shares_memory: bool, offloads_params: bool = False) -> Lifetime:
        """How full parameters live in this stage, among so many ranks.

        One rank has nothing to partition. With shards on the host, a single rank still gathers its parameters: they
        come to the device while they compute.
        """
        if not self.shards_params or (world_size == 1 and not offloads_params):
            return Lifetime.ALWAYS
        return Lifetime.MAPPED if shares_memory else Lifetime.GATHERED


def stage_policy(stage: int, *, reduce_scatter: bool = True, reduces_once: bool = False) -> StagePolicy:
    """The policy of stage 0, 1, 2 or 3.

    Args:
        reduces_once: the gradients of a step accumulate on their rank and are reduced once, as in a pipeline. Stage 2
            keeps full gradients then, too.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage {stage}: there are the stages 0, 1, 2 and 3")
    sharded = stage >= 1
    return StagePolicy(
        stage=stage,
        shards_states=sharded,
        keeps_full_grads=stage <= 1 or (reduces_once and stage == 2),
        reduce_scatter=sharded and reduce_scatter,
        shards_params=stage == 3,
    )
