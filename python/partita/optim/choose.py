"""The optimizer and the schedule of a run: what the program gives, or what the config names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from partita.config import ConfigError, ConfigSource, Given, load_config, resolve_auto
from partita.optim.build import make_optimizer, require_optimizer
from partita.optim.schedules import make_scheduler, require_scheduler

if TYPE_CHECKING:
    from partita.config import Config

OptimizerSource = Optimizer | Callable[[Any], Optimizer] | None
SchedulerSource = Any  # anything with step(), or a function that makes one from an optimizer


_SHORT_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def decided_config(
    source: ConfigSource,
    model: nn.Module,
    optimizer: OptimizerSource,
    lr_scheduler: Any,
    micro_batch: int | None = None,
) -> Config:
    """The config of a run, with every "auto" decided by what the program gives. What the config names exists.

    Args:
        micro_batch: samples in a batch of the program's DataLoader; None: there is none.

    Raises:
        ConfigError: the config does not make sense; names every key at fault.
    """
    config = load_config(source)
    given = Given(
        compute=_compute_of(model),
        optimizer=_in_words(optimizer),
        scheduler=_in_words(lr_scheduler),
        micro_batch=micro_batch,
    )
    require_buildable(config, has_optimizer=optimizer is not None, has_scheduler=lr_scheduler is not None)
    return resolve_auto(config, given)


def require_buildable(config: Config, *, has_optimizer: bool = False, has_scheduler: bool = False) -> None:
    """Raises ConfigError if the config names an optimizer, a schedule or arguments that do not exist.

    What the program gives takes the place of the config's, which is not looked at then.
    """
    if config.optimizer is not None and not has_optimizer:
        try:
            require_optimizer(config.optimizer.type, config.optimizer.params)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if config.scheduler is not None and not has_scheduler:
        try:
            require_scheduler(config.scheduler.type, config.scheduler.params)
        except ValueError as error:
            raise ConfigError(f"scheduler: {error}") from None


def _compute_of(model: nn.Module) -> str | None:
    """The 16-bit type of most of a model's elements; None: most have another."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if not is_lazy(parameter) and parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    return _SHORT_NAMES.get(elements.most_common(1)[0][0]) if elements else None


def _in_words(source: Any) -> str | None:
    if source is None:
        return None
    is_object = hasattr(source, "step") and not isinstance(source, type)
    return f"a {type(source).__name__}" if is_object else "a function that makes one"


def choose_optimizer(
    source: OptimizerSource, model: nn.Module, model_parameters: Iterable[Any] | None, config: Config
) -> Optimizer | None:
    """The user's optimizer, or the config's over `model_parameters`; None if there is neither.

    Raises:
        ConfigError: the config names an optimizer or arguments that do not exist.
        TypeError: the source is neither an optimizer nor a function that makes one.
        ValueError: no parameter requires gradients.
    """
    if isinstance(source, Optimizer):
        return source
    if source is None and config.optimizer is None:
        return None
    parameters = list(model_parameters) if model_parameters is not None else list(model.parameters())
    if isinstance(parameters[0] if parameters else None, torch.Tensor):
        parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires gradients, so an optimizer has nothing to train")
    if source is None and config.optimizer is not None:
        try:
            return make_optimizer(config.optimizer.type, config.optimizer.params, parameters)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    made = source(parameters) if callable(source) else source
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"optimizer: a {type(made).__name__} is not a torch.optim.Optimizer, nor a function that makes one"
        )
    return made


def choose_scheduler(source: Any, optimizer: Optimizer | None, config: Config) -> Any:
    """The user's schedule, or the config's over `optimizer`; None if there is neither.

    Raises:
        ConfigError: the config's schedule does not exist, refuses its arguments, or has no optimizer.
        TypeError: the source has no step(), or needs a metric at every step.
    """
    if source is None and config.scheduler is not None:
        if optimizer is None:
            raise ConfigError(f"scheduler: '{config.scheduler.type}' needs an optimizer, and there is none")
        try:
            source = make_scheduler(config.scheduler.type, config.scheduler.params, optimizer)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"scheduler: {error}") from None
    elif source is not None and not hasattr(source, "step") and callable(source):
        source = source(optimizer)
    if isinstance(source, ReduceLROnPlateau):
        raise TypeError(
            "lr_scheduler: ReduceLROnPlateau needs a metric at every step, which the engine does not have: make it "
            "over the returned optimizer and call its step(metric) yourself"
        )
    if source is not None and not hasattr(source, "step"):
        raise TypeError(f"lr_scheduler: a {type(source).__name__} has no step()")
    return source
