"""The optimizer and the schedule of a run: what the program gives, or what the config names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from partita.config import ConfigError
from partita.optim.build import make_optimizer
from partita.optim.schedules import make_scheduler

if TYPE_CHECKING:
    from partita.config import Config

OptimizerSource = Optimizer | Callable[[Any], Optimizer] | None
SchedulerSource = Any  # anything with step(), or a function that makes one from an optimizer


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
