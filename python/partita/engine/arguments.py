"""What a program gives to `initialize()` and `Engine`, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from partita.config import ConfigError, ConfigSource, load_config, suggest
from partita.data import RepeatingLoader, ShardedLoader
from partita.engine.as_module import AsModule
from partita.optim import ShardedOptimizer

Text = (str, bytes, PathLike)

# Classes whose instances wrap a model and communicate by themselves, by name: importing some of them takes long.
WRAPPERS = {
    "DistributedDataParallel": "give the model itself (its .module): the engine reduces gradients",
    "DataParallel": "give the model itself (its .module), and start one process for each GPU",
    "FullyShardedDataParallel": "give the model itself, built anew: ZeRO stage 3 does what FSDP does",
    "FSDPModule": "give the model without fully_shard(): ZeRO stage 3 does what FSDP does",
    "DeepSpeedEngine": "give the model itself (its .module)",
}


OWN_ORDER = ("model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "config", "collate_fn")


def named_arguments(positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments of `initialize()` by name.

    Args:
        positional: in the order of `OWN_ORDER`, or in that of `named`, which is DeepSpeed's: then the first one is no
            model, and there is one elsewhere.
        named: None stands for an argument that is not given.

    Raises:
        TypeError: there are too many, or one is given twice.
        ValueError: model or sequence parallelism is asked for.
    """
    starts_with_args = bool(positional) and not isinstance(positional[0], nn.Module)
    has_model = isinstance(named["model"], nn.Module) or isinstance((*positional, None, None)[1], nn.Module)
    order = tuple(named) if starts_with_args and has_model else OWN_ORDER
    if len(positional) > len(order):
        raise TypeError(f"initialize() takes {len(order)} arguments without a name, got {len(positional)}")
    given = dict(named)
    for name, value in zip(order, positional, strict=False):
        if given[name] is not None:
            raise TypeError(f"initialize() got {name} twice: by its place and by its name")
        given[name] = value
    for name, what in (("mpu", "model parallelism"), ("mesh_param", "sequence parallelism")):
        if given[name] is not None:
            raise ValueError(f"{name}: there is no {what} in this version; leave {name} out")
    return given


def model_of(model: Any) -> nn.Module:
    """The model of a call.

    Raises:
        TypeError: it is no module, an engine already, or has a wrapper that reduces gradients too; says what to give.
    """
    if isinstance(model, AsModule):
        raise TypeError("model: this is an engine already; give its model, engine.module, after engine.destroy()")
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            wrapper = next((kind.__name__ for kind in type(module).__mro__ if _wraps(kind)), None)
            if wrapper is not None:
                where = f"its module '{name}'" if name else "it"
                raise TypeError(f"model: {where} is wrapped in {wrapper}; {WRAPPERS[wrapper]}")
        return model
    if model is None:
        raise TypeError("initialize() has no model: give model=, a torch.nn.Module")
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model: {model.__name__} is a class; make a model from it: {model.__name__}(...)")
    if isinstance(model, Mapping):
        advice = "give the model, and load a state dict into it before; a config goes to config="
    elif isinstance(model, Text):
        advice = "load the model from there first"
    elif callable(model):
        advice = "give the model that it makes, or put what it computes into the forward() of a module"
    else:
        advice = "give a torch.nn.Module (args= takes a command line's arguments)"
    raise TypeError(f"model: a {type(model).__name__} is no torch.nn.Module; {advice}")


def _wraps(kind: type) -> bool:
    return kind.__name__ in WRAPPERS and kind.__module__.partition(".")[0] in ("torch", "deepspeed")


def check_arguments(
    optimizer: Any, model_parameters: Any, training_data: Any, lr_scheduler: Any, config: Any, collate_fn: Any
) -> None:
    """Raises TypeError, naming the argument, what it is and what is meant, for one of the wrong kind."""
    for name, value, problem in (
        ("optimizer", optimizer, _optimizer_problem(optimizer)),
        ("model_parameters", model_parameters, _parameters_problem(model_parameters)),
        ("training_data", training_data, _data_problem(training_data)),
        ("lr_scheduler", lr_scheduler, _scheduler_problem(lr_scheduler)),
        ("config", config, _config_problem(config)),
        ("collate_fn", collate_fn, "" if collate_fn is None or callable(collate_fn) else "it makes a batch of samples"),
    ):
        if problem:
            raise TypeError(f"{name}: a {type(value).__name__} cannot be used; {problem}")


def _optimizer_problem(value: Any) -> str:
    if isinstance(value, ShardedOptimizer):
        return "it belongs to another engine: make a new one over the model's parameters"
    if value is None or isinstance(value, Optimizer):
        return ""
    if isinstance(value, Mapping):
        return "a config goes to config=, as in initialize(model=model, config={...})"
    if isinstance(value, Text):
        return "name an optimizer in the config, as in {'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-3}}}"
    if isinstance(value, nn.Module):
        return "give one model; initialize(args, model, ...) takes the arguments of a command line first"
    if isinstance(value, list | tuple):
        return "give one optimizer, with a param group for each set of parameters"
    return "" if callable(value) else "give a torch.optim.Optimizer, or a function that makes one from parameters"


def _parameters_problem(value: Any) -> str:
    if isinstance(value, nn.Module):
        return "give its parameters(), or leave model_parameters out for all that require gradients"
    if isinstance(value, torch.Tensor):
        return "give a list of parameters: [parameter]"
    if isinstance(value, Mapping):
        return "give a list of param groups: [{'params': ..., 'lr': ...}]"
    if isinstance(value, Text) or (value is not None and not isinstance(value, Iterable)):
        return "give parameters or param groups, as to a torch optimizer"
    return ""


def _data_problem(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"give one of its data sets (keys {', '.join(map(repr, list(value)[:5]))})"
    if isinstance(value, Text):
        return "load the data set first"
    if isinstance(value, ShardedLoader | RepeatingLoader):
        return "it gives batches already: give the data set, or call engine.train_batch(loader)"
    return ""


def _scheduler_problem(value: Any) -> str:
    if value is None or hasattr(value, "step") or (callable(value) and not isinstance(value, Mapping)):
        return ""
    return "it has no step(): name a schedule in the config, or give one of torch's, or a function that makes one"


def _config_problem(value: Any) -> str:
    if isinstance(value, nn.Module | Optimizer | DataLoader):
        return "it is none: give it under its own name"
    if hasattr(value, "deepspeed_config"):
        return "the arguments of a command line go to args="
    return ""


CONFIG_NAMES = ("config", "config_params", "config_dict", "config_dict_or_path")


def config_of(args: Any, sources: Mapping[str, ConfigSource]) -> ConfigSource:
    """The one config of a call.

    Args:
        args: of a command line; its `deepspeed_config`, or `deepspeed` where that is no flag, names a config.
        sources: by the name of the parameter; None is none.

    Raises:
        ConfigError: two of them differ; names both, and the keys.
        TypeError: a parameter has another name.
    """
    for name in sources:
        if name not in CONFIG_NAMES:
            raise TypeError(f"there is no argument '{name}'{suggest(name, (*OWN_ORDER, 'train_data', *CONFIG_NAMES))}")
    named = {name: source for name, source in sources.items() if source is not None}
    for name in ("deepspeed_config", "deepspeed"):
        value = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
        if value is not None and not isinstance(value, bool):
            named[f"args.{name}"] = value
    first, *others = named or ("config",)
    for other in others:
        if named[other] is not named[first] and (differing := _difference(named[first], named[other])):
            raise ConfigError(
                f"{first} and {other} are two configs that differ in {', '.join(differing[:5])}: give one of them"
            )
    return named.get(first)


def _difference(one: ConfigSource, other: ConfigSource) -> list[str]:
    """Dotted keys with different values."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {path: value}
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}".lstrip(".")).items()}

    a, b = (flat(load_config(source).model_dump(mode="json")) for source in (one, other))
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]
