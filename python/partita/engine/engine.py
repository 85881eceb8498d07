"""The engine of a model that is whole on every rank, or partitioned: one forward, one backward, one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partita.config import ConfigSource
from partita.data import ShardedLoader, Sharding, call_with, loss_in, micro_batches, on_device
from partita.engine.base import EngineBase
from partita.engine.phase import Phase, require, require_loss
from partita.model import Accumulation, LossScaling, ModelPart, device_of, require_only_parameters_of
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
from partita.run import begin_run, loss_scaler_of
from partita.step import OptimizerStep
from partita.units import ParameterGathers


class Engine(EngineBase):
    """A model in training.

    One step is, for each micro-batch, `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`; the last of
    `gradient_accumulation_steps` steps updates the parameters. All ranks call the same methods in the same order.

    The model's parameters become views into flat buffers; gradients are consumed as they arrive, so `parameter.grad` is
    None after a backward.

    Args:
        model: on the device to train on, the CPU or a GPU; its parameters are converted in place as the config says.
        optimizer: over the model's parameters (or a function that makes one from them); None: the config's.
        model_parameters: parameters or param groups for the config's optimizer; None: all that require gradients.
        train_data: a dataset or an iterable of samples; `dataloader` then gives this rank's micro-batches.
        lr_scheduler: over the optimizer (or a function that makes one from it), stepped after every update that was not
            skipped; None: the config's.
        config: dict, path to a JSON file, or `Config`.
        collate_fn: makes a micro-batch from a list of samples.

    Raises:
        ConfigError: the config does not make sense; names every key at fault.
        ValueError, TypeError: the model or the optimizer cannot be trained as asked; names the parameter or class.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSource = None,
        model_parameters: Iterable[Any] | None = None,
        train_data: Any = None,
        lr_scheduler: SchedulerSource = None,
        config: ConfigSource = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        # What refuses comes first, while the model is as the program gave it. A later error undoes what was done.
        with ExitStack() as exits, ExitStack() as on_failure:
            decided = decided_config(config, model, optimizer, lr_scheduler, train_data)
            run = begin_run(decided, device_of(model), exits)
            inner = choose_optimizer(optimizer, model, model_parameters, run.config)
            if inner is not None:
                require_only_parameters_of(model, inner)
                require_supported(inner, run.policy, splits_masters=run.splits_masters)
            outer = None if inner is None else ShardedOptimizer(inner)
            if inner is not None:
                on_failure.callback(kept_groups(inner))  # a schedule changes learning rates when it is made
            scheduler = choose_scheduler(lr_scheduler, outer, run.config)
            loader = None
            if train_data is not None:
                data = run.grid.data
                sharding = Sharding(data.rank, data.world_size, run.batch.micro, run.config.seed)
                loader = ShardedLoader(train_data, sharding, collate_fn=collate_fn)
            controller = StepController(loss_scaler_of(run.config, run.precision), run.streams)
            scaling = LossScaling(controller.scale if run.precision.scales_loss else None)
            accumulation = Accumulation(run.batch.accumulation, run.policy)
            gathers = ParameterGathers()
            exits.callback(gathers.close)
            part = ModelPart(model, inner, run, scaling, accumulation, gathers, exits)
            step = OptimizerStep(run, [part], outer, scheduler, controller, gathers, exits)
            exits.callback(gathers.wait)
            super().__init__(run, model, [part], step, outer, scheduler, loader, exits)
            on_failure.pop_all()
        self._scaling = scaling
        self._accumulation = accumulation
        self._has_forward = False  # in this micro-batch
        self._backwards_before = 0  # backwards of the part before this micro-batch

    @classmethod
    def initialize(cls, *args: Any, **kwargs: Any) -> tuple[Engine, Optimizer | None, ShardedLoader | None, Any]:
        """The same as `partita.initialize`."""
        return initialize(*args, **kwargs)

    # -- one micro-batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model. In training mode with gradients enabled this begins a micro-batch."""
        require("__call__()", self._phase, Phase.READY, Phase.FORWARD, Phase.BACKWARD)
        with self._step.timers.phase("forward"):
            outputs = self._part.forward(*args, **kwargs)
        if self.module.training and torch.is_grad_enabled():
            self._has_forward = True
        return outputs

    def backward(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Adds the gradients of `loss` (a scalar, this micro-batch's mean) to this step's; returns the loss.

        The step's gradient is the mean over its micro-batches and ranks. float16 losses are scaled here.
        """
        if not self._is_destroyed:
            require_loss(loss)
        require("backward()", self._phase, Phase.FORWARD, Phase.BACKWARD, hint=self._why_no_forward())
        self._backwards_before = (
            self._part.ended_backwards
        )  # if this one fails, those before it are not enough for a step
        with self._step.timers.phase("backward"):
            self._part.backward([self.scale(loss)], retain_graph=retain_graph)
        self._step.controller.add_loss(loss)
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for a `backward()` of one's own; `engine.backward` does it by itself."""
        return self._scaling.scale(loss)

    def step(self) -> None:
        """Ends a micro-batch; at the boundary, updates the parameters and the learning rate.

        On a GPU this queues the work and does not wait for it. Whether the step was skipped is learned during the next
        one: only then the learning rate moves and the step is reported.
        """
        for part in self._parts:
            part.finish_backward()
        require("step()", self._phase, Phase.BACKWARD)
        at_boundary = self._accumulation.is_boundary
        self._accumulation.advance()
        self._part.forget()
        self._begin_micro_batch()
        if at_boundary:
            self._step.update()

    def train_batch(self, batch: Any = None) -> Tensor:
        """One whole optimizer step; returns the mean loss of this rank's micro-batches, detached.

        Args:
            batch: an iterator over micro-batches, or one batch that is split along dimension 0 into
                `gradient_accumulation_steps` parts; None: the engine's own `dataloader`. CPU tensors are copied to the
                model's device. The model must return its loss.
        """
        if batch is None:
            if self.dataloader is None:
                raise ValueError("train_batch() needs a batch or an iterator: the engine was given no train_data")
            batch = iter(self.dataloader.next_batch, object())  # nothing equals the object, so this never ends
        count = self._run.batch.accumulation
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for micro_batch in micro_batches(batch, count):
            loss = loss_in(call_with(self, on_device(micro_batch, self.device)))
            self.backward(loss)
            self.step()
            total += loss.detach().reshape(())
        return total / count

    @torch.no_grad()
    def eval_batch(self, batch: Any) -> Any:
        """The model's output for a batch in evaluation mode, without gradients."""
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            return call_with(self, on_device(batch, self.device))
        finally:
            for module in training:
                module.training = True

    def train(self, mode: bool = True) -> Engine:
        """Training mode, as `nn.Module.train`."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Evaluation mode, as `nn.Module.eval`."""
        return self.train(False)

    # -- accumulation

    @property
    def micro_steps(self) -> int:
        """Micro-batches so far."""
        return self._accumulation.micro_steps

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards in this block accumulate on this rank; the next one outside, or the step, reduces them all.

        Raises:
            RuntimeError: in stages 2 and 3, which have no room for gradients that are not reduced.
        """
        return self._accumulation.no_sync()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates the parameters."""
        return self._accumulation.is_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decides by hand whether steps update; None: every `gradient_accumulation_steps`, as at the start.

        Gradients are divided by `gradient_accumulation_steps` in any case.
        """
        self._accumulation.boundary = is_boundary

    def zero_grad(self) -> None:
        """Begins the step anew: drops the gradients since the last update, and what an interrupted backward left."""
        for part in self._parts:
            part.give_up()
        self._step.controller.forget_losses()
        self._accumulation.restart()
        self._begin_micro_batch()

    def token_mean(self, loss_sum: Tensor, tokens_in_step: int) -> Tensor:
        """A micro-batch's loss such that the step's gradient is that of the mean over all tokens of all ranks.

        The engine averages over micro-batches and ranks; when these hold different numbers of valid tokens, that is
        not the mean over tokens. A collective: all ranks call it for each micro-batch.

        Args:
            loss_sum: summed loss of this micro-batch, a scalar.
            tokens_in_step: valid tokens of this rank in all micro-batches of the step together. If no rank has any,
                that is an error on the CPU, and on a GPU, where nobody waits for the sum, a step that is skipped.
        """
        data = self._run.grid.data
        total = torch.full((1,), float(tokens_in_step), dtype=torch.float64, device=self.device)
        data.all_reduce(total).wait()
        if not self._run.streams.is_asynchronous and not total.item():
            raise ValueError("token_mean(): no rank has a valid token in this step")
        factor = self._run.batch.accumulation * data.world_size / total
        return loss_sum * factor.to(torch.promote_types(loss_sum.dtype, torch.float32)).reshape(())

    # -- the order of calls

    @property
    def _part(self) -> ModelPart:
        """The only one, until the engine is destroyed."""
        return self._parts[0]

    @property
    def _phase(self) -> Phase:
        """Where the micro-batch is, by what the program has called."""
        if self._is_destroyed:
            return Phase.DESTROYED
        if self._part.ended_backwards > self._backwards_before:
            return Phase.BACKWARD
        return Phase.FORWARD if self._has_forward else Phase.READY

    def _why_no_forward(self) -> str:
        """Why a loss with a graph came, and no forward of this engine that could have made it."""
        if not self.module.training:
            return "the model is in evaluation mode, where no forward trains: call engine.train() before engine(batch)"
        return "model(batch) and engine.module(batch) do not count: call engine(batch)"

    def _begin_micro_batch(self) -> None:
        self._has_forward = False
        self._backwards_before = sum(part.ended_backwards for part in self._parts)


def initialize(
    model: nn.Module,
    optimizer: OptimizerSource = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: SchedulerSource = None,
    config: ConfigSource = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> tuple[Engine, Optimizer | None, ShardedLoader | None, Any]:
    """Makes a model ready to train; see `Engine` for the arguments (`training_data` is its `train_data`).

    Returns:
        (engine, optimizer, dataloader, lr_scheduler); the last three are None where there is none.
    """
    engine = Engine(model, optimizer, model_parameters, training_data, lr_scheduler, config, collate_fn)
    return engine, engine.optimizer, engine.dataloader, engine.lr_scheduler
