"""The engine of a model that is whole on every rank, or partitioned: one forward, one backward, one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partita.comm import init_distributed, note_rank
from partita.config import ConfigSource
from partita.data import Reading, ShardedLoader, call_with, loss_in, micro_batches, on_device
from partita.engine.arguments import OWN_ORDER, config_of, model_of, named_arguments
from partita.engine.base import EngineBase
from partita.engine.dtype_notes import explain_dtypes
from partita.engine.phase import Phase, require, require_loss
from partita.engine.pipeline_engine import PipelineEngine
from partita.engine.prepare import Given, prepare
from partita.model import Accumulation, ModelPart
from partita.optim import OptimizerSource, SchedulerSource
from partita.pipeline import PipelineModule
from partita.step import OptimizerStep

logger = logging.getLogger("partita")


class Engine(EngineBase):
    """A model in training.

    One step is, for each micro-batch, `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`; the last of
    `gradient_accumulation_steps` steps updates the parameters. All ranks call the same methods in the same order.

    The model's parameters become views into flat buffers. Gradients are consumed as they arrive: `parameter.grad` has
    the form of a gradient after a backward, and no values, see `TakenGradient`.

    Args:
        model: on the device to train on, the CPU or a GPU; its parameters are converted in place as the config says.
        optimizer: over the model's parameters (or a function that makes one from them); None: the config's.
        model_parameters: parameters or param groups for the config's optimizer; None: all that require gradients.
        train_data: a dataset or an iterable of samples, or a DataLoader, of which see `partita.data.loading_of`;
            `dataloader` then gives this rank's micro-batches.
        lr_scheduler: over the optimizer (or a function that makes one from it), stepped after every update that was not
            skipped; None: the config's.
        config: dict, path to a JSON file, or `Config`; `config_dict`, `config_dict_or_path` and `config_params` are
            other names for it.
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
        **config_names: ConfigSource,
    ) -> None:
        # What refuses comes first, while model and ranks are as the program gave them. A later error undoes all.
        with ExitStack() as on_failure, ExitStack() as exits:
            on_failure.push(note_rank)
            model = model_of(model)
            source = config_of(None, {"config": config, **config_names})
            given = Given(optimizer, model_parameters, train_data, lr_scheduler, source, collate_fn)
            given.check()
            ready = prepare(model, given, exits, on_failure)
            run, gathers = ready.run, ready.gathers
            accumulation = Accumulation(run.batch.accumulation, run.policy)
            part = ModelPart(model, ready.inner, run, ready.scaling, accumulation, gathers, exits)
            step = OptimizerStep(run, [part], ready.optimizer, ready.scheduler, ready.controller, gathers, exits)
            exits.callback(gathers.wait)
            super().__init__(run, model, [part], step, ready.optimizer, ready.scheduler, ready.loader, exits)
            on_failure.pop_all()
        self._scaling, self._accumulation = ready.scaling, accumulation
        self._has_forward = self._was_at_boundary = False  # in this micro-batch; in the last step()
        self._backwards_before = 0  # backwards of the part before this micro-batch
        self._reading = Reading()

    _has_warned_of_restart = False

    @classmethod
    def initialize(cls, *args: Any, **kwargs: Any) -> tuple[EngineBase, Optimizer | None, ShardedLoader | None, Any]:
        """The same as `partita.initialize`."""
        return initialize(*args, **kwargs)

    # -- one micro-batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model. With gradients enabled this begins a micro-batch."""
        require("__call__()", self._phase, Phase.READY, Phase.FORWARD, Phase.BACKWARD)
        self._heed()
        phase = "forward" if torch.is_grad_enabled() else "evaluation"
        with self._calls.inside("engine()"), self._step.timers.phase(phase):
            try:
                outputs = self._part.forward(*args, **kwargs)
            except RuntimeError as error:
                explain_dtypes(error, self.module, (args, kwargs))
                raise
        if torch.is_grad_enabled():
            self._has_forward = True
            self._step.add_work(args, kwargs)
        return outputs

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Adds the gradients of `loss` (a scalar, this micro-batch's mean) to this step's; returns the loss.

        The step's gradient is the mean over its micro-batches and ranks. float16 losses are scaled here. In which mode
        the model is, and which of its methods made the loss, is of no concern.

        Args:
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: False: the sum over micro-batches takes the place of the mean, as the program has divided the
                loss by `gradient_accumulation_steps` already.
        """
        if not self._is_destroyed:
            require_loss(loss)
        require("backward()", self._phase, Phase.READY, Phase.FORWARD, Phase.BACKWARD)
        self._heed()
        # If this one fails, those before it are not enough for a step.
        self._backwards_before = self._part.ended_backwards
        with self._calls.inside("backward()"), self._step.timers.phase("backward"):
            counted = loss if scale_wrt_gas else loss * self._run.batch.accumulation
            self._part.backward([self.scale(counted)], retain_graph=retain_graph)
        self._step.controller.add_loss(counted)
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for a `backward()` of one's own; `engine.backward` does it by itself."""
        if self._run.precision.scales_loss:  # what the program has written is not scaled, and stays apart
            self._part.take_written()
        return self._scaling.scale(loss)

    def step(self) -> None:
        """Ends a micro-batch; at the boundary, updates the parameters and the learning rate.

        On a GPU this queues the work and does not wait for it. Whether the step was skipped is learned during the next
        one: only then the learning rate moves and the step is reported.
        """
        self._accumulation.require_sync("step()")
        with self._calls.inside("step()"):
            self._heed()
            for part in self._parts:
                part.finish_backward()
            require("step()", self._phase, Phase.BACKWARD)
            self._was_at_boundary = False  # should the update fail
            at_boundary = self._accumulation.is_boundary
            self._accumulation.advance()
            self._part.forget()
            self._begin_micro_batch()
            if at_boundary:
                self._beside.before_update()
                self._step.update()
            else:
                self._part.commit()
            self._was_at_boundary = at_boundary
        if at_boundary:
            self._after_update()

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated the parameters: at a boundary, and not skipped. On a GPU the host waits."""
        return self._was_at_boundary and self._step.was_applied()

    def train_batch(self, batch: Any = None, *, data_iter: Any = None) -> Tensor:
        """One whole optimizer step; returns the mean loss of this rank's micro-batches, detached.

        Args:
            batch: an iterator over micro-batches; a DataLoader, of which each call takes the next micro-batches, epoch
                after epoch; or one batch that is split along dimension 0 into `gradient_accumulation_steps` parts.
                None: the engine's own `dataloader`. CPU tensors are copied to the model's device. The model must return
                its loss.
            data_iter: an iterator or a DataLoader, under DeepSpeed's name.
        """
        if batch is None and data_iter is None:
            if self.dataloader is None:
                raise ValueError("train_batch() needs a batch or an iterator: the engine was given no train_data")
            batch = self.dataloader
        count = self._run.batch.accumulation
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for micro_batch in micro_batches(self._reading.source(batch, data_iter, "train_batch"), count):
            loss = loss_in(call_with(self, on_device(micro_batch, self.device)))
            self.backward(loss)
            self.step()
            total += loss.detach().reshape(())
        return total / count

    @torch.no_grad()
    def eval_batch(self, batch: Any = None, *, data_iter: Any = None) -> Any:
        """The model's output for a batch in evaluation mode, without gradients.

        Of an iterator or a DataLoader (`data_iter` is DeepSpeed's name): the mean loss of this rank's next
        `gradient_accumulation_steps` micro-batches. The model must return its loss then.
        """
        if batch is None and data_iter is None:
            raise ValueError("eval_batch() needs a batch, or an iterator over micro-batches")
        source = self._reading.source(batch, data_iter, "eval_batch")
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            if not isinstance(source, Iterator):
                return call_with(self, on_device(source, self.device))
            batches = micro_batches(source, self._run.batch.accumulation)
            losses = [loss_in(call_with(self, on_device(b, self.device))).float().reshape(()) for b in batches]
            return torch.stack(losses).mean()
        finally:
            for module in training:
                module.training = True

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begins the step anew: drops the gradients since the last update, and what an interrupted backward left.

        The gradients of finished micro-batches go, too. `optimizer.zero_grad()` and `module.zero_grad()` keep those,
        and drop the ones since the last `step()`.

        Args:
            set_to_none: as in torch; it makes no difference here.
        """
        if self._phase is Phase.READY and self._accumulation.is_amid:
            self._warn_of_restart()
        for part in self._parts:
            part.give_up()
        self._step.controller.forget_told()
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
        with self._calls.inside("token_mean()"):
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
        if self._is_torn:
            return Phase.TORN
        if self._part.ended_backwards > self._backwards_before:
            return Phase.BACKWARD
        return Phase.FORWARD if self._has_forward else Phase.READY

    def _begin_micro_batch(self) -> None:
        self._has_forward = False
        self._forget_backwards()

    def _forget_backwards(self) -> None:
        self._backwards_before = sum(part.ended_backwards for part in self._parts)

    def _heed(self) -> None:
        """Gradients that the program has dropped are gone, also from the order of calls."""
        for part in self._parts:
            if part.heed():
                self._forget_backwards()

    def _warn_of_restart(self) -> None:
        if not self._has_warned_of_restart and self._run.is_first:
            logger.warning(
                "engine.zero_grad() drops the gradients of finished micro-batches, too: a loop that calls it in every "
                "micro-batch takes no step; call optimizer.zero_grad() there, or nothing, as engine.step() does it"
            )
        self._has_warned_of_restart = True


def initialize(
    *positional: Any,
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: OptimizerSource = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: SchedulerSource = None,
    distributed_port: int | None = None,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: ConfigSource = None,
    mesh_param: None = None,
    config_params: ConfigSource = None,
) -> tuple[EngineBase, Optimizer | None, ShardedLoader | None, Any]:
    """Makes a model ready to train; `Engine` and `PipelineEngine` have more on the arguments.

    Args:
        positional: model, optimizer, model_parameters, training_data, lr_scheduler, config, collate_fn, in this order.
            If the first one is no model and the second one is, all are in DeepSpeed's order: that of the names below.
        args: of a command line: its `deepspeed_config` is the config when no other is given.
        model: a `torch.nn.Module` on the device to train on, without a wrapper. A `partita.pipeline.PipelineModule`
            gets a `PipelineEngine`, any other an `Engine`.
        optimizer: over the model's parameters, or a function that makes one from them; None: the config's.
        model_parameters: parameters or param groups for the config's optimizer; None: all that require gradients.
        training_data: a data set, an iterable of samples, or a DataLoader (its data, batch size and collate function).
        lr_scheduler: over the optimizer, or a function that makes one from it; None: the config's.
        distributed_port: the port of rank 0 where the launcher sets no MASTER_PORT.
        mpu, mesh_param: None; there is no model or sequence parallelism.
        dist_init_required: False: the process group must be there.
        collate_fn: makes a micro-batch from a list of samples.
        config: a dict, the path of a JSON file, or a `Config`; None: all defaults. config_params: the same.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler); the last three are None where there is none.

    Raises:
        ConfigError, TypeError, ValueError: something cannot be used, or contradicts something else; names it.
    """
    named = dict(locals())
    given = named_arguments(named.pop("positional"), named)
    settings = config_of(given["args"], {name: given[name] for name in ("config", "config_params")})
    if given["distributed_port"] is not None or given["dist_init_required"] is False:
        port, required = given["distributed_port"], given["dist_init_required"]
        init_distributed(distributed_port=port, dist_init_required=required)
    own: list[Any] = [settings if name == "config" else given[name] for name in OWN_ORDER]
    engine: EngineBase = (PipelineEngine if isinstance(given["model"], PipelineModule) else Engine)(*own)
    return engine, engine.optimizer, engine.dataloader, engine.lr_scheduler
