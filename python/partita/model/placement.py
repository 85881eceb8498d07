"""What initialize() does to a model before it trains: choose parameters, cast the rest, make ranks agree."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from partita.comm import Communicator
from partita.units import Holder, full_values, has_reducer, holder_of, require_on, take_back

logger = logging.getLogger("partita")


def optimized_parameters(model: nn.Module, optimizer: Optimizer | None) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, optimizer group) of what is trained, in the model's order of registration.

    Raises:
        ValueError: the optimizer has a parameter that is not the model's, or another engine trains one.
    """
    groups: dict[nn.Parameter, int] = {}
    if optimizer is not None:
        groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    named = dict(model.named_parameters())
    own = set(named.values())
    for parameter, i in groups.items():
        if parameter not in own:
            raise ValueError(
                f"optimizer group {i} has a parameter of shape {tuple(parameter.shape)} that the model does not have: "
                "make it part of the model that initialize() is given"
            )
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
    what, tensor = next(itertools.chain(parameters, buffers), ("", torch.empty(0)))
    if tensor.is_cpu or tensor.is_cuda:
        return tensor.device
    advice = "give it values with to_empty() first" if tensor.is_meta else "move the model to one of those first"
    raise ValueError(f"{what} is on device '{tensor.device}': Partita trains on the CPU and on CUDA devices; {advice}")


def refuse_compiled(model: nn.Module) -> None:
    """Raises ValueError, naming the module, if torch.compile was applied: it keeps the addresses of parameters."""
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            raise ValueError(
                f"module '{name or type(module).__name__}' is compiled (torch.compile), which ZeRO stage 3 does not "
                "support: its parameters come and go; use stage 0, 1 or 2, or leave it uncompiled"
            )


def untrained_parameters(model: nn.Module, trained: list[tuple[str, nn.Parameter, int]]) -> dict[str, nn.Parameter]:
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
    for name, parameter in untrained.items():
        if parameter in partitioned:
            continue
        require_on(communicator.device, f"parameter '{name}'", parameter)
        if holder_of(parameter) is not None:  # from a construction inside zero.Init()
            take_back(parameter, full_values(parameter))
        if compute is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
        parameter.data = _from_rank_0(parameter.data, communicator)
    placed: dict[torch.Tensor, torch.Tensor] = {}  # modules that share a buffer still do
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            require_on(communicator.device, f"buffer '{path}.{name}'" if path else f"buffer '{name}'", buffer)
            if buffer not in placed:
                cast = buffers is not None and buffer.is_floating_point()
                placed[buffer] = _from_rank_0(buffer.to(buffers) if cast else buffer, communicator)
            module._buffers[name] = placed[buffer]
    forgotten = [name for name, p in untrained.items() if p.requires_grad]
    if forgotten and communicator.rank == 0:
        logger.warning(
            "%d parameters require gradients but are in no optimizer group and will not be trained: '%s'%s",
            len(forgotten),
            forgotten[0],
            ", ..." if len(forgotten) > 1 else "",
        )


def _from_rank_0(tensor: torch.Tensor, communicator: Communicator) -> torch.Tensor:
    values = tensor.contiguous()
    communicator.broadcast(values, 0).wait()
    if values is tensor or 0 in tensor.stride():  # an expanded tensor cannot be written to
        return values
    return tensor.copy_(values)


def state_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is in the module's state dict, by name, each valid until the next is asked for.

    Partitioned parameters are gathered one unit at a time: a collective, which all ranks go through to the end. So what
    comes first and last is not the order of the state dict.
    """
    state = module.state_dict(keep_vars=True)
    held_by: dict[Holder | None, list[str]] = {}
    for name, value in state.items():
        holder = holder_of(value) if isinstance(value, torch.Tensor) else None
        held_by.setdefault(holder, []).append(name)
    for holder, names in held_by.items():
        if holder is None:
            for name in names:
                yield name, state[name].detach() if isinstance(state[name], torch.Tensor) else state[name]
            continue
        with holder.whole() as values_of:
            for name in names:
                yield name, values_of(state[name])


def clone_state_dict(module: nn.Module, wanted: bool = True) -> dict[str, Any]:
    """The module's state dict with memory of its own; tensors that share memory still do.

    A collective if parameters are partitioned. `wanted`: false where another rank asks and this one does not.
    """
    clones: dict[tuple[object, ...], torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in state_tensors(module):
        if not wanted:
            continue
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()._cdata
            key = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
            if value.numel() == 0 or key not in clones:
                clones[key] = value.clone()
            value = clones[key]
        values[name] = value
    return {name: values[name] for name in module.state_dict(keep_vars=True) if name in values}
