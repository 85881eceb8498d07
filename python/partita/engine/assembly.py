"""What `initialize()` is given, turned into what the engine needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from partita.comm import Communicator
from partita.config import BatchSizes, ConfigError, resolve_batch_sizes
from partita.model import ModelGuard, optimized_parameters, place_untrained, refuse_compiled, untrained_parameters
from partita.optim import make_optimizer, make_scheduler
from partita.run import Precision
from partita.units import Lifetime, ModelUnits, Offload, StagePolicy, UnitSettings, build_units, lifetime_of

if TYPE_CHECKING:
    from partita.config import Config

logger = logging.getLogger("partita")

OptimizerSource = Optimizer | Callable[[Any], Optimizer] | None


def with_batch_sizes(config: Config, world_size: int) -> tuple[Config, BatchSizes]:
    """The config with all three batch sizes filled in, and the sizes."""
    sizes = resolve_batch_sizes(
        train=config.train_batch_size,
        micro=config.train_micro_batch_size_per_gpu,
        accumulation=config.gradient_accumulation_steps,
        world_size=world_size,
    )
    filled = {
        "train_batch_size": sizes.train,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
    }
    return config.model_copy(update=filled), sizes


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
            raise ConfigError(str(error)) from error
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
            raise ConfigError(f"scheduler: {error}") from error
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


def _unit_settings(config: Config, compute: torch.dtype | None, grads: torch.dtype | None) -> UnitSettings:
    """How the config wants units to be cut and kept; for the dtypes see `Precision`."""
    zero = config.zero_optimization
    optimizer, params = zero.offload_optimizer, zero.offload_param
    offload = Offload(
        states=optimizer.ratio if optimizer.device == "cpu" else 0.0,
        params=params.device == "cpu",
        pin=params.pin_memory if params.device == "cpu" else optimizer.pin_memory,
    )
    return UnitSettings(
        bucket_numel=min(zero.reduce_bucket_size, zero.allgather_bucket_size),
        compute_dtype=compute,
        grad_dtype=grads,
        splits_masters=config.bf16.master_weights == "split",
        unit_classes=zero.unit_classes,
        persistent_numel=zero.stage3_param_persistence_threshold,
        offload=offload,
    )


@dataclass(frozen=True)
class TakenModel:
    """A model whose parameters lie in units. gathering: carries parameters that are gathered while they compute; None
    where there are none."""

    units: ModelUnits
    guard: ModelGuard
    gathering: Communicator | None


def take_model(
    model: nn.Module,
    optimizer: Optimizer | None,
    config: Config,
    precision: Precision,
    policy: StagePolicy,
    communicator: Communicator,
    beside: Callable[[], Communicator],
) -> TakenModel:
    """Moves the model's parameters into units, and makes ranks agree about all that it has.

    Args:
        optimizer: over what is trained; None: nothing is.
        beside: makes another communicator of the same ranks.

    Raises:
        ValueError, TypeError: the model cannot be trained like this; names the parameter or module.
    """
    if policy.shards_params:
        refuse_compiled(model)
    trained = optimized_parameters(model, optimizer)
    untrained = untrained_parameters(model, trained)
    settings = _unit_settings(config, precision.compute, precision.grads)
    lifetime = lifetime_of(policy, communicator, settings.offload)
    gathering = beside() if lifetime is Lifetime.GATHERED else None
    units = build_units(
        model,
        trained,
        untrained,
        settings,
        communicator=communicator,
        gathering=gathering or communicator,
        policy=policy,
    )
    partitioned = {p for unit in units.frozen for p in unit.parameters}
    place_untrained(model, untrained, partitioned, communicator, precision.compute, precision.buffers)
    return TakenModel(units, ModelGuard(model, units.trained, untrained), gathering)


def show_log_on(rank: int) -> None:
    """Prints the library's messages on rank 0, unless the program set up logging itself."""
    if rank == 0 and not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[partita] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
