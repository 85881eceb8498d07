"""A model's parameters, cut into units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from partita.comm import Communicator
from partita.device import kernels
from partita.units.blocks import find_blocks, owners_of
from partita.units.layout import ParameterInfo, UnitLayout, make_layout, plan_buckets
from partita.units.parameters import RESIDENT, FlatParameters, Lifetime, Offload, fill_from_rank_0
from partita.units.policy import StagePolicy
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

    @property
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


@dataclass(frozen=True)
class _Plan:
    indices: list[int]
    lifetime: Lifetime
    owner: int | None  # the block


def lifetime_of(policy: StagePolicy, communicator: Communicator, offload: Offload = RESIDENT) -> Lifetime:
    """How full parameters live in this stage, among these ranks."""
    if not policy.shards_params or (communicator.world_size == 1 and not offload.params):
        return Lifetime.ALWAYS
    return Lifetime.MAPPED if communicator.shares_memory else Lifetime.GATHERED


def build_units(
    model: nn.Module,
    trained: list[NamedParameter],
    untrained: dict[str, nn.Parameter],
    settings: UnitSettings,
    *,
    communicator: Communicator,
    gathering: Communicator,
    policy: StagePolicy,
) -> ModelUnits:
    """Moves parameters into flat buffers, with rank 0's values on every rank; of the untrained ones those that are
    partitioned.

    Memory beside the result is bounded by one parameter, and in stages 0 to 2 by the fp32 weights of one unit.

    Args:
        gathering: carries the parameters of stage 3. Gathers follow the modules and reductions the gradients: each has
            an order of its own, which is the same on all ranks.

    Raises:
        TypeError, ValueError: a parameter's dtype or device cannot be trained; names it. A class of `unit_classes` is
            not in the model.
    """
    lifetime = lifetime_of(policy, communicator, settings.offload)
    blocks = find_blocks(model, settings.unit_classes) if policy.shards_params else []  # which refuses unknown classes
    blocks = blocks if lifetime is Lifetime.GATHERED else []
    groups = [ParameterGroup(module) for module in (*blocks, model)]
    device = communicator.device

    def infos_of(named: list[NamedParameter]) -> list[ParameterInfo]:
        return [_info(name, p, group, settings.compute_dtype, device) for name, p, group in named]

    def layout_of(infos: list[ParameterInfo], plan: _Plan, dtype: torch.dtype) -> UnitLayout:
        # In every stage, so that the norm is summed in the same parts.
        multiple = communicator.mapped_multiple(dtype)
        return make_layout([infos[i] for i in plan.indices], communicator.world_size, multiple)

    infos, units = infos_of(trained), []
    to_offload = settings.offload.states * sum(info.numel for info in infos)
    for plan in _plan_units(infos, _owners(trained, blocks, model), len(blocks), lifetime, settings):
        parameters = [trained[i][1] for i in plan.indices]
        dtype = settings.compute_dtype or parameters[0].dtype
        layout, grad_dtype = layout_of(infos, plan, dtype), settings.grad_dtype or dtype
        numel = sum(infos[i].numel for i in plan.indices)
        # Units that are reduced early have the longest time to reach the host.
        offload = settings.offload if numel / 2 <= to_offload else RESIDENT
        to_offload -= numel if offload is settings.offload else 0
        form = UnitForm(dtype, grad_dtype, settings.splits_masters, offload)
        units.append(Unit(layout, parameters, form, communicator, gathering, policy, plan.lifetime))
        if plan.lifetime is not Lifetime.ALWAYS:
            groups[-1 if plan.owner is None else plan.owner].units.append(units[-1])
    frozen = [
        (name, p, 0) for name, p in untrained.items() if lifetime is not Lifetime.ALWAYS and p.dtype in kernels.DTYPES
    ]
    infos, kept = infos_of(frozen), []
    for plan in _plan_units(infos, _owners(frozen, blocks, model), len(blocks), lifetime, settings):
        if plan.lifetime is Lifetime.ALWAYS:
            continue
        parameters = [frozen[i][1] for i in plan.indices]
        dtype = settings.compute_dtype or parameters[0].dtype
        layout = layout_of(infos, plan, dtype)
        own = layout.shard_range(communicator.rank)
        flat = FlatParameters(layout, parameters, dtype, communicator, own, plan.lifetime, gathering, settings.offload)
        fill_from_rank_0(flat.own_params, layout, own, parameters, communicator)
        flat.take_parameters()
        kept.append(flat)
        groups[-1 if plan.owner is None else plan.owner].units.append(flat)
    if lifetime is Lifetime.MAPPED:
        communicator.barrier()  # then every rank may read what the others have filled in
    return ModelUnits(units, kept, [group for group in groups[:-1] if group.units] + groups[-1:])


def _owners(named: list[NamedParameter], blocks: list[nn.Module], model: nn.Module) -> list[int | None]:
    return owners_of([p for _, p, _ in named], blocks, model)


def _plan_units(
    infos: list[ParameterInfo], owners: list[int | None], blocks: int, lifetime: Lifetime, settings: UnitSettings
) -> list[_Plan]:
    """In the order in which backward completes them: the last block first, then what is outside of blocks."""
    if lifetime is not Lifetime.GATHERED:
        return [_Plan(bucket, lifetime, None) for bucket in plan_buckets(infos, settings.bucket_numel)]
    plans = []
    persistent = [i for i, info in enumerate(infos) if info.numel <= settings.persistent_numel]
    others = [i for i, info in enumerate(infos) if info.numel > settings.persistent_numel]
    for owner in [*reversed(range(blocks)), None]:
        members = [i for i in others if owners[i] == owner]
        for bucket in plan_buckets([infos[i] for i in members], settings.bucket_numel):
            plans.append(_Plan([members[i] for i in bucket], lifetime, owner))
    for bucket in plan_buckets([infos[i] for i in persistent], settings.bucket_numel):
        plans.append(_Plan([persistent[i] for i in bucket], Lifetime.ALWAYS, None))
    return plans


def require_on(device: torch.device, what: str, tensor: torch.Tensor) -> None:
    """Raises ValueError, naming `what`, for a tensor on another device."""
    if tensor.device != device:
        raise ValueError(
            f"{what} is on device '{tensor.device}', the model on '{device}': "
            + ("give it values with to_empty() first" if tensor.is_meta else "move the whole model to one device first")
        )


def _info(
    name: str, parameter: nn.Parameter, group: int, compute_dtype: torch.dtype | None, device: torch.device
) -> ParameterInfo:
    if parameter.dtype not in kernels.DTYPES:
        raise TypeError(
            f"parameter '{name}' is {parameter.dtype}: Partita trains float32, float16 and bfloat16; convert the model "
            "before initialize(), or freeze the parameter"
        )
    require_on(device, f"parameter '{name}'", parameter)
    dtype = compute_dtype or parameter.dtype
    return ParameterInfo(name, tuple(parameter.shape), group, dtype.itemsize, str(dtype))
