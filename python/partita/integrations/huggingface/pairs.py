"""Models with their optimizers, and engines of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from partita import Engine
from partita.integrations.huggingface.inputs import cast_inputs


def paired(args: Sequence[Any], engines: Sequence[Engine]) -> list[tuple[nn.Module, Optimizer]]:
    """The models among the arguments of `prepare()` that have an optimizer there.

    Args:
        engines: what was prepared before.

    Raises:
        ValueError: an optimizer has parameters of no model there, or it would be the second one.
    """
    models = [arg for arg in args if isinstance(arg, nn.Module) and not _is_prepared(arg)]
    optimizers = [arg for arg in args if isinstance(arg, Optimizer) and not _is_prepared(arg)]
    if not optimizers:
        return []
    trained = [engine for engine in engines if engine.optimizer is not None]
    if len(optimizers) + len(trained) > 1:
        raise ValueError(
            "a PartitaAccelerator trains one model with one optimizer: give the second one to a "
            "PartitaAccelerator of its own, or to partita.initialize()"
        )
    [optimizer] = optimizers
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in models:
        if wanted <= {id(p) for p in model.parameters()}:
            return [(model, optimizer)]
    if not models:
        raise ValueError(
            f"prepare({type(optimizer).__name__}): an optimizer comes in one call with its model, in any order: "
            "prepare(model, optimizer)"
        )
    raise ValueError(
        f"prepare(): the {type(optimizer).__name__} has parameters that are not in {type(models[0]).__name__}: make "
        "the optimizer from the parameters of the model that is given"
    )


def engine_of(
    model: nn.Module, optimizer: Optimizer | None, config: dict[str, Any], device: torch.device | None
) -> Engine:
    """An engine of a model; the model is moved to the device if one is given."""
    if device is not None and any(p.device.type != device.type for p in model.parameters()):
        model.to(device)
    engine = Engine(model, optimizer, config=config)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for name in dtype:
        if getattr(engine.config, name).enabled:
            cast_inputs(model, dtype[name])
    if engine.config.zero_optimization.stage == 3 and engine.world_size > 1:
        _mark_as_one_of_many(model)
    return engine


def _mark_as_one_of_many(model: nn.Module) -> None:
    """The ranks of this model run the same modules, as each has a part of the parameters. `transformers` asks for this
    mark: `generate()` then goes on until the texts of all ranks are complete, and LayerDrop leaves no layer out."""
    for module in model.modules():
        module._is_fsdp_managed_module = True  # type: ignore[assignment]


def _is_prepared(thing: Any) -> bool:
    return bool(getattr(thing, "_is_accelerate_prepared", False))
