"""What happens to a model before it trains: its parameters move into units, and all ranks agree about all it has."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from partita.comm import Communicator
from partita.device import HOST
from partita.device.kernels import why_no_memory
from partita.run import Run
from partita.units import (
    AbsentParameter,
    Lifetime,
    ModelUnits,
    NamedParameter,
    Offload,
    UnitSettings,
    build_units,
    find_blocks,
    full_values,
    has_reducer,
    holder_of,
    lifetime_of,
    require_on,
    take_back,
)

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class TakenModel:
    """A model whose parameters lie in units.

    untrained: parameters that are frozen, or unknown to the optimizer. gathering: carries parameters that are gathered
    while they compute; None where there are none.
    """

    units: ModelUnits
    untrained: dict[str, nn.Parameter]
    gathering: Communicator | None


def take_model(model: nn.Module, optimizer: Optimizer | None, run: Run, exits: ExitStack) -> TakenModel:
    """Moves the model's parameters into units, and makes ranks agree about all that it has.

    Args:
        optimizer: over what is trained; None: nothing is.
        exits: gives the parameters back.

    Raises:
        ValueError, TypeError: the model cannot be trained like this; names the parameter or module. The model is as it
            was then.
    """
    refuse_unfit(model, run)
    trained = optimized_parameters(model, optimizer)
    untrained = untrained_parameters(model, trained)
    settings = _unit_settings(run)
    data = run.grid.data
    lifetime = lifetime_of(run.policy, data, settings.offload)
    gathering = run.grid.beside_data() if lifetime is Lifetime.GATHERED else None
    units = build_units(
        model,
        trained,
        untrained,
        settings,
        communicator=data,
        gathering=gathering or data,
        policy=run.policy,
        streams=run.streams,
    )
    exits.callback(units.close)
    partitioned = {p for unit in units.frozen for p in unit.parameters}
    place_untrained(model, untrained, partitioned, data, run.precision.compute, run.precision.buffers)
    if trained:
        _warn_of_forgotten(untrained, warns=data.rank == 0)
    return TakenModel(units, untrained, gathering)


def refuse_unfit(model: nn.Module, run: Run) -> None:
    """Raises what taking the model over would raise in its midst.

    Raises:
        ValueError: something is on another device or has no memory of its own, a named class of blocks is missing, or a
            module is compiled in stage 3; names it.
        AbsentParameterError: a parameter has no values, as the engine that had them is gone; names it.
    """
    for name, parameter in model.named_parameters():
        _require_memory(f"parameter '{name}'", parameter)
        require_on(run.device, f"parameter '{name}'", parameter)
        if type(parameter) is AbsentParameter and holder_of(parameter) is None:
            parameter.detach()  # raises, and says what to do
    for name, buffer in model.named_buffers():
        require_on(run.device, f"buffer '{name}'", buffer)
        if run.grid.data.world_size > 1:  # all take rank 0's values
            _require_memory(f"buffer '{name}'", buffer)
    if run.policy.shards_params:
        _refuse_compiled(model)
        find_blocks(model, run.config.zero_optimization.unit_classes)


def _unit_settings(run: Run) -> UnitSettings:
    """How the config wants units to be cut and kept."""
    zero = run.config.zero_optimization
    optimizer, params = zero.offload_optimizer, zero.offload_param
    offload = Offload(
        states=optimizer.ratio if optimizer.device == "cpu" else 0.0,
        params=params.device == "cpu",
        pin=run.device.type == "cuda" and (params.pin_memory if params.device == "cpu" else optimizer.pin_memory),
    )
    return UnitSettings(
        bucket_numel=run.bucket_numel,
        compute_dtype=run.precision.compute,
        grad_dtype=run.precision.grads,
        splits_masters=run.splits_masters,
        unit_classes=zero.unit_classes,
        persistent_numel=zero.stage3_param_persistence_threshold,
        offload=offload,
    )


def require_only_parameters_of(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises ValueError, naming the group and the shape, if the optimizer has a parameter that the model lacks."""
    own = set(model.parameters())
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in own:
                raise ValueError(
                    f"optimizer group {i} has a parameter of shape {tuple(parameter.shape)} that the model does not "
                    "have: make it part of the model that initialize() is given"
                )


def optimized_parameters(model: nn.Module, optimizer: Optimizer | None) -> list[NamedParameter]:
    """(name, parameter, optimizer group) of what is trained, in the model's order of registration.

    Raises:
        ValueError: another engine trains a parameter; names it.
    """
    groups: dict[nn.Parameter, int] = {}
    if optimizer is not None:
        groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if has_reducer(parameter):
            raise ValueError(
                f"parameter '{name}' is trained by another engine already: call destroy() on that engine first, or "
                "give initialize() a model of its own"
            )
    return [(name, p, groups[p]) for name, p in named.items() if p.requires_grad and p in groups]


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first parameter, or buffer; the CPU if it has none.

    Raises:
        ValueError: neither the CPU nor a CUDA device; names the parameter.
    """
    parameters = ((f"parameter '{name}'", p) for name, p in model.named_parameters())
    buffers = ((f"buffer '{name}'", b) for name, b in model.named_buffers())
    what, tensor = next(itertools.chain(parameters, buffers), ("", torch.empty(0, dtype=torch.uint8, device=HOST)))
    if tensor.is_cpu or tensor.is_cuda:
        return tensor.device
    advice = "give it values with to_empty() first" if tensor.is_meta else "move the model to one of those first"
    raise ValueError(f"{what} is on device '{tensor.device}': Partita trains on the CPU and on CUDA devices; {advice}")


def _require_memory(what: str, tensor: torch.Tensor) -> None:
    """Raises ValueError, naming `what`, for a tensor without memory of its own."""
    reason = why_no_memory(tensor)
    if reason is None or tensor.is_meta:  # which `require_on` has more to say about
        return
    if is_lazy(tensor):
        raise ValueError(f"{what} {reason}: run the model on one batch before initialize()")
    raise ValueError(
        f"{what} {reason}: Partita partitions plain tensors, with memory of their own; give initialize() the model "
        "without fully_shard(), tp_plan=, FakeTensorMode or quantised, nested and sparse tensors"
    )


def _refuse_compiled(model: nn.Module) -> None:
    """Raises ValueError, naming the module, if one is compiled: it keeps addresses of parameters, or takes no hooks."""
    for name, module in model.named_modules():
        is_script = isinstance(module, torch.jit.ScriptModule)
        if is_script or module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            by = "torch.jit" if is_script else "torch.compile"
            raise ValueError(
                f"module '{name or type(module).__name__}' is compiled ({by}), which ZeRO stage 3 does not "
                "support: its parameters come and go; use stage 0, 1 or 2, or leave it uncompiled"
            )


def untrained_parameters(model: nn.Module, trained: list[NamedParameter]) -> dict[str, nn.Parameter]:
    """The model's other parameters: frozen, or unknown to the optimizer."""
    known = {p for _, p, _ in trained}
    return {name: p for name, p in model.named_parameters() if p not in known}


def place_untrained(
    model: nn.Module,
    untrained: dict[str, nn.Parameter],
    partitioned: set[nn.Parameter],
    communicator: Communicator,
    compute: torch.dtype | None,
    buffers: torch.dtype | None,
) -> None:
    """Casts untrained parameters to the compute dtype, and buffers only if asked; all take rank 0's values. Those that
    are partitioned have been placed already.

    Raises:
        ValueError: one of them is on another device; names it.
    """
    for parameter in untrained.values():
        if parameter in partitioned:
            continue
        if holder_of(parameter) is not None:  # from a construction inside zero.Init()
            take_back(parameter, full_values(parameter))
        if compute is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
        parameter.data = _from_rank_0(parameter.data, communicator)
    placed: dict[torch.Tensor, torch.Tensor] = {}  # modules that share a buffer still do
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer not in placed:
                cast = buffers is not None and buffer.is_floating_point()
                placed[buffer] = _from_rank_0(buffer.to(buffers) if cast else buffer, communicator)
            module._buffers[name] = placed[buffer]


def _warn_of_forgotten(untrained: Mapping[str, nn.Parameter], *, warns: bool) -> None:
    forgotten = [name for name, p in untrained.items() if p.requires_grad]
    if forgotten and warns:
        logger.warning(
            "%d parameters require gradients but are in no optimizer group and will not be trained: '%s'%s",
            len(forgotten),
            forgotten[0],
            ", ..." if len(forgotten) > 1 else "",
        )


def _from_rank_0(tensor: torch.Tensor, communicator: Communicator) -> torch.Tensor:
    if why_no_memory(tensor) is not None:  # a sparse buffer of the only rank, say
        return tensor
    values = tensor.contiguous()
    communicator.broadcast(values, 0).wait()
    if values is tensor or 0 in tensor.stride():  # an expanded tensor cannot be written to
        return values
    return tensor.copy_(values)
