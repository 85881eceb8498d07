"""Giving values to a model that was built on the meta device, one module at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from partita.config import load_config
from partita.zero.partitioner import partitioning
from partita.zero.storage import ShardMemory


def materialize(
    model: nn.Module,
    initialize: Callable[[nn.Module], Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    config: Any = None,
) -> nn.Module:
    """Initialises a model from the meta device, and partitions it over the ranks as it goes; returns the model.

    Each module's own parameters and buffers get memory and values, and are partitioned before the next module's turn.
    Shared parameters stay shared. All ranks draw rank 0's random numbers.

    Args:
        model: built under `torch.device("meta")`; what is not on the meta device stays as it is.
        initialize: fills a module's own parameters and buffers; None: the module's `reset_parameters()`. For a Hugging
            Face model, its `_init_weights`.
        config: as for `Init`.

    Raises:
        ValueError: a module left a parameter or buffer without values; names it.
    """
    settings = load_config({"train_micro_batch_size_per_gpu": 1} if config is None else config)
    made: dict[nn.Parameter, nn.Parameter] = {}
    # A module may fill what it shares with an earlier one, too.
    with partitioning(settings, ShardMemory()) as partitioner, torch.no_grad():
        for path, module in model.named_modules():
            new = _give_memory(module, torch.device(device), made)
            if not new:
                continue
            fill = initialize or _reset(path, module)
            fill(module)
            for name, tensor in new.items():
                full_name = f"{path}.{name}" if path else name
                tensor = getattr(module, name)
                if tensor.numel() and bool(tensor.isnan().all()):
                    raise ValueError(
                        f"'{full_name}' has no values after {type(module).__name__} was initialised: give "
                        "materialize() an initialize= that fills it, or build it outside of the meta device"
                    )
                if isinstance(tensor, nn.Parameter):
                    partitioner.registered(module, name, tensor)
            partitioner.close()
    return model


def _give_memory(module: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]) -> dict[str, Any]:
    """The module's own tensors, now with memory and without values; those that it shares with others not again."""
    new: dict[str, Any] = {}
    for name, parameter in list(module._parameters.items()):
        if parameter is None or not parameter.is_meta:
            continue
        if parameter not in made:
            values = _nowhere(parameter, device, name)
            made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            new[name] = made[parameter]
        module._parameters[name] = made[parameter]
    for name, buffer in list(module._buffers.items()):
        if buffer is not None and buffer.is_meta:
            new[name] = module._buffers[name] = _nowhere(buffer, device, name)
    return new


def _nowhere(tensor: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise ValueError(
            f"'{name}' is {tensor.dtype} and on the meta device, where it lost its values: build it elsewhere"
        )
    return torch.full_like(tensor, float("nan"), device=device)


def _reset(path: str, module: nn.Module) -> Callable[[nn.Module], Any]:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names = ", ".join(name for name, _ in own)
        raise ValueError(
            f"module '{path}' ({type(module).__name__}) has {names} and no reset_parameters(): give materialize() an "
            "initialize= that fills them"
        )
    return lambda _module: reset()
