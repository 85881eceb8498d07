"""What comes before a model is taken: the arguments checked, config, optimizer, schedule, ranks, data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from partita.comm import Entries, WaitsLedger
from partita.config import ConfigSource
from partita.data import ShardedLoader, loading_of, sharded_loader
from partita.engine.agreement import model_entries, shared_by_ranks
from partita.engine.arguments import check_arguments
from partita.model import LossScaling, device_of, require_only_parameters_of
from partita.monitor import require_libraries
from partita.optim import (
    OptimizerSource,
    SchedulerSource,
    ShardedOptimizer,
    StepController,
    choose_optimizer,
    choose_scheduler,
    decided_config,
    kept_groups,
    require_supported,
)
from partita.run import Run, begin_run, checked_config, loss_scaler_of, policy_of, splits_masters
from partita.units import ParameterGathers


@dataclass(frozen=True)
class Given:
    """What a program gives to an engine beside the model; see `Engine`."""

    optimizer: OptimizerSource
    model_parameters: Iterable[Any] | None
    train_data: Any
    lr_scheduler: SchedulerSource
    config: ConfigSource
    collate_fn: Callable[[list[Any]], Any] | None

    def check(self) -> None:
        """Raises TypeError, naming the argument, for one of the wrong kind."""
        check_arguments(
            self.optimizer, self.model_parameters, self.train_data, self.lr_scheduler, self.config, self.collate_fn
        )


@dataclass(frozen=True)
class Prepared:
    """A job whose ranks have joined, and whose model is as the program gave it.

    inner: the user's optimizer, or the config's. optimizer: the one that programs get. scaling, gathers: for the parts
    of the model.
    """

    run: Run
    inner: Optimizer | None
    optimizer: ShardedOptimizer | None
    scheduler: Any
    loader: ShardedLoader | None
    controller: StepController
    scaling: LossScaling
    gathers: ParameterGathers


def prepare(
    model: nn.Module,
    given: Given,
    exits: ExitStack,
    on_failure: ExitStack,
    pipe: int | None = None,
    described: Entries | None = None,
) -> Prepared:
    """Checks what the program gives, and joins the ranks. What refuses comes first. A collective.

    Args:
        model: of this rank.
        exits: closes what was made here.
        on_failure: gives back what was changed, if something fails later.
        pipe: as for `begin_run`.
        described: what all ranks know of the model, where each has another part of it; None: all have the same.

    Raises:
        ConfigError, ValueError, TypeError: something cannot be used, or contradicts something else; names it.
    """
    loading = loading_of(given.train_data, given.collate_fn)
    decided = decided_config(given.config, model, given.optimizer, given.lr_scheduler, loading.batch_size)
    settings, device = checked_config(decided, loading.batch_size, pipe), device_of(model)
    require_libraries(settings)
    inner = choose_optimizer(given.optimizer, model, given.model_parameters, settings)
    if inner is not None:
        require_only_parameters_of(model, inner)
        require_supported(inner, policy_of(settings, pipe), splits_masters=splits_masters(settings))
        on_failure.callback(kept_groups(inner))  # a schedule changes learning rates when it is made
    outer = None if inner is None else ShardedOptimizer(inner)
    scheduler = choose_scheduler(given.lr_scheduler, outer, settings)
    of_model = model_entries(model, inner) if described is None else described
    shared = shared_by_ranks(settings, of_model, inner, scheduler, given.train_data)
    dtypes = {p.dtype for p in model.parameters()}
    run = begin_run(settings, device, exits, shared, dtypes, loading.batch_size, on_failure, pipe)
    loader = None if given.train_data is None else sharded_loader(loading, run)
    scaler = loss_scaler_of(run.config, run.precision)
    controller = StepController(scaler, run.streams, run.world_size, WaitsLedger(run.grid))
    scaling = LossScaling(controller.scale if run.precision.scales_loss else None)
    gathers = ParameterGathers(run.streams)
    exits.callback(gathers.close)
    return Prepared(run, inner, outer, scheduler, loader, controller, scaling, gathers)
