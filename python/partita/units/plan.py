"""How a model's parameters are cut into units: pure decisions, from descriptions of parameters to layouts.

Building a model follows these plans. Whatever sums memory or bytes can do so over the same plans, without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partita.units.layout import ParameterInfo, UnitLayout, make_layout, plan_buckets
from partita.units.policy import Lifetime


@dataclass(frozen=True)
class PlanSettings:
    """What decides how units are cut.

    Args:
        world_size: ranks that share a unit.
        lifetime: of all parameters that are not persistent.
        bucket_numel: the elements of a unit at most; a larger parameter has a unit of its own.
        persistent_numel: where parameters are GATHERED, those of at most so many elements are ALWAYS there.
        offload_share: of the trained elements, the share whose optimizer states are on the host.
        shard_multiples: element size in bytes -> the elements of a shard are a multiple of this; 1 where it is missing.
            The multiple applies in every stage, so that the norm is summed in the same parts in all of them.
    """

    world_size: int
    lifetime: Lifetime
    bucket_numel: int
    persistent_numel: int = 0
    offload_share: float = 0.0
    shard_multiples: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitPlan:
    """A unit before it has memory.

    `indices` say which of the planned parameters are in the unit, in the order of its slots. `block` is the index of
    the module that needs the unit; None: the root. `offloads`: the optimizer states are on the host.
    """

    indices: tuple[int, ...]
    layout: UnitLayout
    lifetime: Lifetime
    block: int | None
    kind: str
    element_bytes: int
    offloads: bool = False

    @property
    def parameter_numel(self) -> int:
        """Elements of the parameters, without padding."""
        return sum(slot.numel for slot in self.layout.slots)


def plan_trained(infos: Sequence[ParameterInfo], settings: PlanSettings) -> list[UnitPlan]:
    """The units of trained parameters, in the order in which backward completes them."""
    left = settings.offload_share * sum(info.numel for info in infos)
    plans = []
    for cut in _cuts(infos, settings):
        numel = sum(infos[i].numel for i in cut.indices)
        # Units that are reduced early have the longest time to reach the host, so the share is filled from the front. A
        # unit goes to the host when that brings the sum nearer to the share than leaving it out.
        offloads = settings.offload_share > 0 and numel / 2 <= left
        left -= numel if offloads else 0
        plans.append(_plan(infos, cut, settings, offloads=offloads))
    return plans


def plan_frozen(infos: Sequence[ParameterInfo], settings: PlanSettings) -> list[UnitPlan]:
    """The units of frozen parameters that come and go.

    A frozen parameter that is ALWAYS there needs no unit: it has neither shards nor states, so it is in no plan.
    """
    cuts = [cut for cut in _cuts(infos, settings) if cut.lifetime is not Lifetime.ALWAYS]
    return [_plan(infos, cut, settings) for cut in cuts]


@dataclass(frozen=True)
class _Cut:
    indices: list[int]
    lifetime: Lifetime
    block: int | None


def _cuts(infos: Sequence[ParameterInfo], settings: PlanSettings) -> list[_Cut]:
    """Which parameters share a unit: the last block comes first, the root follows the blocks, and what is persistent
    comes last."""
    if settings.lifetime is not Lifetime.GATHERED:
        # Nothing travels when a module needs its parameters, so units need not follow the blocks.
        return [_Cut(bucket, settings.lifetime, None) for bucket in plan_buckets(list(infos), settings.bucket_numel)]
    persistent = [i for i, info in enumerate(infos) if info.numel <= settings.persistent_numel]
    members: dict[int | None, list[int]] = {}
    for i, info in enumerate(infos):
        if info.numel > settings.persistent_numel:
            members.setdefault(info.block, []).append(i)
    blocks = sorted((block for block in members if block is not None), reverse=True)
    cuts = [
        _Cut(bucket, settings.lifetime, block)
        for block in (*blocks, None)
        for bucket in _buckets(infos, members.get(block, []), settings.bucket_numel)
    ]
    return cuts + [_Cut(bucket, Lifetime.ALWAYS, None) for bucket in _buckets(infos, persistent, settings.bucket_numel)]


def _buckets(infos: Sequence[ParameterInfo], members: list[int], bucket_numel: int) -> list[list[int]]:
    """Buckets of some of the parameters, as indices of all of them."""
    return [[members[i] for i in bucket] for bucket in plan_buckets([infos[i] for i in members], bucket_numel)]


def _plan(infos: Sequence[ParameterInfo], cut: _Cut, settings: PlanSettings, *, offloads: bool = False) -> UnitPlan:
    first = infos[cut.indices[0]]
    multiple = settings.shard_multiples.get(first.element_bytes, 1)
    layout = make_layout([infos[i] for i in cut.indices], settings.world_size, multiple)
    return UnitPlan(tuple(cut.indices), layout, cut.lifetime, cut.block, first.kind, first.element_bytes, offloads)
