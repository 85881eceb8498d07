"""A model's parameters, moved into units: the plans of `plan.py` carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn

from partita.comm import Communicator
from partita.device import Streams, kernels
from partita.units.blocks import find_blocks, owners_of
from partita.units.layout import ParameterInfo
from partita.units.parameters import FlatParameters, fill_from_rank_0
from partita.units.plan import PlanSettings, UnitPlan, plan_frozen, plan_trained
from partita.units.policy import RESIDENT, Lifetime, Offload, StagePolicy
from partita.units.residence import Always, Gathered, Mapped, Residence
from partita.units.unit import Unit, UnitForm

NamedParameter = tuple[str, nn.Parameter, int]  # with its optimizer group


@dataclass(frozen=True)
class UnitSettings:
    """How units are cut, and in which formats they are kept.

    compute_dtype: of the parameters; None: each keeps its own. grad_dtype: in which gradients accumulate; None: the
    parameters'. splits_masters: the masters of bf16 parameters are 16 bits beside them. unit_classes,
    persistent_numel: see `zero_optimization.unit_classes` and `stage3_param_persistence_threshold`.
    """

    bucket_numel: int
    compute_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    splits_masters: bool = False
    unit_classes: Sequence[str] | None = None
    persistent_numel: int = 0
    offload: Offload = RESIDENT


@dataclass
class ParameterGroup:
    """What a module needs while it computes: the blocks of a model, and the model itself for all that is outside."""

    module: nn.Module
    units: list[FlatParameters] = field(default_factory=list)

    @cached_property
    def numel(self) -> int:
        """Elements of the full parameters."""
        return sum(unit.layout.numel for unit in self.units)


@dataclass(frozen=True)
class ModelUnits:
    """trained: in launch order. frozen: those that are partitioned. groups: blocks in their order, the model last;
    without what is always there."""

    trained: list[Unit]
    frozen: list[FlatParameters]
    groups: list[ParameterGroup]

    def close(self) -> None:
        """Lets go of all parameters."""
        for flat in (*self.trained, *self.frozen):
            flat.abandon()
        for flats in (self.trained, self.frozen, self.groups):
            flats.clear()


def lifetime_of(policy: StagePolicy, communicator: Communicator, offload: Offload = RESIDENT) -> Lifetime:
    """How full parameters live in this stage, among these ranks."""
    return policy.lifetime(
        world_size=communicator.world_size,
        shares_memory=communicator.shares_memory,
        offloads_params=offload.params,
    )


def plan_settings(settings: UnitSettings, lifetime: Lifetime, communicator: Communicator) -> PlanSettings:
    """How units are cut among these ranks."""
    return PlanSettings(
        world_size=communicator.world_size,
        lifetime=lifetime,
        bucket_numel=settings.bucket_numel,
        persistent_numel=settings.persistent_numel,
        offload_share=settings.offload.states,
        shard_multiples={dtype.itemsize: communicator.mapped_multiple(dtype) for dtype in kernels.DTYPES},
    )


def build_units(
    model: nn.Module,
    trained: list[NamedParameter],
    untrained: dict[str, nn.Parameter],
    settings: UnitSettings,
    *,
    communicator: Communicator,
    gathering: Communicator,
    policy: StagePolicy,
    streams: Streams,
) -> ModelUnits:
    """Moves parameters into flat buffers, with rank 0's values on every rank; of the untrained ones those that are
    partitioned.

    Memory beside the result is bounded by one parameter, and in stages 0 to 2 by the fp32 weights of one unit. Whatever
    refuses does so before any parameter has moved.

    Args:
        gathering: carries the parameters of stage 3. Gathers follow the modules and reductions the gradients: each has
            an order of its own, which is the same on all ranks.
        streams: of the model's device.

    Raises:
        TypeError, ValueError: a parameter's dtype or device cannot be trained; names it. A class of `unit_classes` is
            not in the model.
    """
    lifetime = lifetime_of(policy, communicator, settings.offload)
    blocks = find_blocks(model, settings.unit_classes) if policy.shards_params else []  # which refuses unknown classes
    frozen = [(name, p, 0) for name, p in untrained.items() if p.dtype in kernels.DTYPES]
    cut = plan_settings(settings, lifetime, communicator)
    describe = partial(_describe, model, blocks, settings.compute_dtype, communicator.device)
    trained_plans, frozen_plans = plan_trained(describe(trained), cut), plan_frozen(describe(frozen), cut)

    builder = _Builder(settings, policy, communicator, gathering, streams)
    units: list[Unit] = []
    kept: list[FlatParameters] = []
    try:
        units += (builder.trained(plan, trained) for plan in trained_plans)
        kept += (builder.frozen(plan, frozen) for plan in frozen_plans)
    except BaseException:  # no memory, say, or a rank is gone
        ModelUnits(units, kept, []).close()
        raise
    groups = [ParameterGroup(module) for module in (*blocks, model)]
    for plan, unit in zip((*trained_plans, *frozen_plans), (*units, *kept), strict=True):
        if unit.residence.comes_and_goes:
            groups[-1 if plan.block is None else plan.block].units.append(unit)
    if any(unit.residence.is_read_by_peers for unit in (*units, *kept)):
        communicator.barrier()  # from here on every rank may read what the others have filled in
    return ModelUnits(units, kept, [group for group in groups[:-1] if group.units] + groups[-1:])


@dataclass(frozen=True)
class _Builder:
    """Makes units from plans."""

    settings: UnitSettings
    policy: StagePolicy
    communicator: Communicator
    gathering: Communicator
    streams: Streams

    def trained(self, plan: UnitPlan, named: list[NamedParameter]) -> Unit:
        """The unit of a plan, with its states."""
        offload = self.settings.offload if plan.offloads else RESIDENT
        residence = self._residence(plan, named, offload, shards=self.policy.shards_states)
        grad_dtype = self.settings.grad_dtype or residence.dtype
        form = UnitForm(grad_dtype, self.settings.splits_masters, offload)
        return Unit(residence, form, self.policy, self.streams)

    def frozen(self, plan: UnitPlan, named: list[NamedParameter]) -> FlatParameters:
        """The parameters of a plan, without states."""
        flat = FlatParameters(self._residence(plan, named, self.settings.offload, shards=True))
        fill_from_rank_0(flat.own_params, flat.layout, flat.own, flat.parameters, self.communicator)
        flat.take_parameters()
        return flat

    def _residence(self, plan: UnitPlan, named: list[NamedParameter], offload: Offload, *, shards: bool) -> Residence:
        """The one place where a lifetime becomes a class."""
        layout, communicator = plan.layout, self.communicator
        parameters = [named[i][1] for i in plan.indices]
        dtype = self.settings.compute_dtype or parameters[0].dtype
        own = layout.shard_range(communicator.rank) if shards else range(layout.numel)
        if plan.lifetime is Lifetime.ALWAYS:
            return Always(layout, parameters, dtype, own, communicator)
        if plan.lifetime is Lifetime.MAPPED:
            return Mapped(layout, parameters, dtype, own, communicator)
        return Gathered(layout, parameters, dtype, own, communicator, self.streams, self.gathering, offload)


def require_on(device: torch.device, what: str, tensor: torch.Tensor) -> None:
    """Raises ValueError, naming `what`, for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(
            f"{what} is on device '{tensor.device}', the model on '{device}': "
            + ("give it values with to_empty() first" if tensor.is_meta else "move the whole model to one device first")
        )


def _describe(
    model: nn.Module,
    blocks: list[nn.Module],
    compute_dtype: torch.dtype | None,
    device: torch.device,
    named: list[NamedParameter],
) -> list[ParameterInfo]:
    """What plans need to know of parameters."""
    owners = owners_of([p for _, p, _ in named], blocks, model)
    return [
        _info(name, parameter, group, owner, compute_dtype, device)
        for (name, parameter, group), owner in zip(named, owners, strict=True)
    ]


def _info(
    name: str,
    parameter: nn.Parameter,
    group: int,
    block: int | None,
    compute_dtype: torch.dtype | None,
    device: torch.device,
) -> ParameterInfo:
    if parameter.dtype not in kernels.DTYPES:
        raise TypeError(
            f"parameter '{name}' is {parameter.dtype}: Partita trains float32, float16 and bfloat16; convert the model "
            "before initialize(), or freeze the parameter"
        )
    require_on(device, f"parameter '{name}'", parameter)
    dtype = compute_dtype or parameter.dtype
    return ParameterInfo(name, tuple(parameter.shape), group, dtype.itemsize, str(dtype), block)
