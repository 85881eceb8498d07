"""`initialize()` and the `Engine` that it returns: the parts composed, and the order in which they are called."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partita.comm import CommunicationError, backend_for, init_distributed, world_communicator
from partita.config import ConfigSource, load_config, save_config
from partita.data import ShardedLoader, call_with, differentiable_tensors, loss_in, micro_batches, on_device
from partita.device import streams_of
from partita.engine.assembly import (
    OptimizerSource,
    choose_optimizer,
    choose_scheduler,
    show_log_on,
    take_model,
    with_batch_sizes,
)
from partita.engine.phase import Phase, require
from partita.model import (
    ActivationCheckpoints,
    BackwardWatch,
    ParameterAccess,
    clone_state_dict,
    device_of,
    save_weights,
)
from partita.monitor import PhaseTimers, StepReporter
from partita.optim import ShardedOptimizer, StepController, require_supported
from partita.run import loss_scaler_of, precision_of
from partita.step import SkipGuard, StepLedger
from partita.units import (
    BackwardPlan,
    GradientReducer,
    ParameterGathers,
    ParameterLifetimes,
    ReductionSettings,
    stage_policy,
)
from partita.zero import WeightSource, load_weights

logger = logging.getLogger("partita")

SchedulerSource = Any  # anything with step(), or a function that makes one from an optimizer


class Engine:
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
        loaded = load_config(config)
        device = device_of(model)
        self._streams = streams_of(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is made without naming a device belongs here, and not on GPU 0
        init_distributed(backend_for(device))
        connect = partial(
            world_communicator, loaded.comm.transport, timedelta(seconds=loaded.comm.timeout_seconds), device
        )
        self._communicator = connect()
        show_log_on(self._communicator.rank)
        self.config, self._batch = with_batch_sizes(loaded, self._communicator.world_size)
        self.module = model
        self.global_steps = 0
        self.micro_steps = 0
        self._phase = Phase.READY
        self._boundary_override: bool | None = None
        self._no_sync = False

        precision = precision_of(self.config, self._batch.accumulation)
        self._autocast = precision.autocast
        self._controller = StepController(loss_scaler_of(self.config, precision), self._streams)
        zero = self.config.zero_optimization
        splits_masters = self.config.bf16.master_weights == "split"
        policy = stage_policy(zero.stage, reduce_scatter=zero.reduce_scatter)
        inner = choose_optimizer(optimizer, model, model_parameters, self.config)
        if inner is not None:
            require_supported(inner, policy, splits_masters=splits_masters)  # while the model is as the user gave it
        beside = partial(connect, beside=self._communicator)
        taken = take_model(model, inner, self.config, precision, policy, self._communicator, beside)
        self._units, self._frozen = taken.units.trained, taken.units.frozen
        self._guard, self._gathering = taken.guard, taken.gathering
        self._gathers = ParameterGathers()
        self._sharded: ShardedOptimizer | None = None
        if inner is not None:
            self._sharded = ShardedOptimizer(
                inner, self._units, self._communicator, policy, self._controller, self._gathers
            )
        self.optimizer: Optimizer | None = self._sharded
        self.lr_scheduler = choose_scheduler(lr_scheduler, self.optimizer, self.config)
        self.dataloader = None if train_data is None else self._make_loader(train_data, collate_fn)
        self._endless: Iterator[Any] | None = None  # over the dataloader, for train_batch()
        # What refuses its arguments comes first: the following leave hooks on the model.
        if zero.overlap_gather:
            self._gathers.wait_in_forward(model, self._units)
        self._lifetimes = ParameterLifetimes(
            taken.units.groups,
            self._gathering,
            prefetch_numel=zero.stage3_prefetch_bucket_size,
            max_live_numel=zero.stage3_max_live_parameters,
            no_more_gradients=lambda units: self._reducer.no_more_gradients(units),
        )
        checkpointing = self.config.activation_checkpointing
        self._checkpoints: ActivationCheckpoints | None = None
        if checkpointing.enabled:
            self._checkpoints = ActivationCheckpoints(
                model, checkpointing.classes, on_host=checkpointing.cpu_checkpointing
            )
        # Stored gradients are sums over micro-batches and ranks, divided by `predivide`.
        predivide = self._predivide()
        self._mean = predivide / (self._batch.accumulation * self._communicator.world_size)
        self._reducer = GradientReducer(
            self._units,
            self._communicator,
            policy,
            ReductionSettings(precision.communication, 1.0 / predivide, zero.overlap_comm),
            self._streams,
            plan_backward=self._plan_backward,
            after_backward=self._end_backward,
            before_reduction=self._lifetimes.before_reduction if zero.overlap_comm else self._lifetimes.gather_rest,
        )
        scale = self._controller.scale if precision.scales_loss else None
        self._backwards = BackwardWatch(scale, self._reducer.finish_backward)
        prints = self.config.steps_per_print or 0
        timed = self.config.wall_clock_breakdown and self.global_rank == 0 and prints > 0
        self._timers = PhaseTimers(timed, self._streams)
        reporter = StepReporter(self.global_rank, prints, self._timers)
        skips = SkipGuard(
            self._controller.scaler,
            self._reducer,
            self._communicator,
            limit=self.config.max_consecutive_skipped_steps,
            lag=1 if self._streams.is_asynchronous else 0,
        )
        self._access = ParameterAccess(
            self._units,
            self._sharded,
            self._reducer,
            self._gathers,
            self._communicator,
            grad_factor=lambda: self._mean / self._controller.loss_scale.scale,
        )
        for unit in self._units:
            unit.access = weakref.ref(self._access)
        self._ledger = StepLedger(self.lr_scheduler, self._learning_rates, reporter, skips)
        self._announce(precision.name)

    @classmethod
    def initialize(cls, *args: Any, **kwargs: Any) -> tuple[Engine, Optimizer | None, ShardedLoader | None, Any]:
        """The same as `partita.initialize`."""
        return initialize(*args, **kwargs)

    # -- one micro-batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model. In training mode with gradients enabled this begins a micro-batch."""
        require("__call__()", self._phase, Phase.READY, Phase.FORWARD, Phase.BACKWARD)
        with self._timers.phase("forward"), self._autocast_context():
            try:
                outputs = self.module(*args, **kwargs)
            except BaseException:
                self._lifetimes.release_all()
                raise
        if self.module.training and torch.is_grad_enabled():
            if self._phase is Phase.READY:
                self._phase = Phase.FORWARD
            self._backwards.watch(differentiable_tensors(outputs))
        return outputs

    def backward(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Adds the gradients of `loss` (a scalar, this micro-batch's mean) to this step's; returns the loss.

        The step's gradient is the mean over its micro-batches and ranks. float16 losses are scaled here.
        """
        require("backward()", self._phase, Phase.FORWARD, Phase.BACKWARD)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"engine.backward() needs a scalar loss, not a {what}: reduce it with .mean() or .sum()")
        self._phase = Phase.FORWARD
        with self._timers.phase("backward"):
            self.scale(loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            self._reducer.finish_backward()
            if self._phase is Phase.FORWARD:  # this loss reaches no parameter, but those of other ranks may
                self._reducer.reduce_zeros()
        self._backwards.backward_ended()
        self._phase = Phase.BACKWARD
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for a `backward()` of one's own; `engine.backward` does it by itself."""
        return self._backwards.scale(loss)

    def step(self) -> None:
        """Ends a micro-batch; at the boundary, updates the parameters and the learning rate.

        On a GPU this queues the work and does not wait for it. Whether the step was skipped is learned during the next
        one: only then the learning rate moves and the step is reported.
        """
        self._reducer.finish_backward()
        require("step()", self._phase, Phase.BACKWARD)
        at_boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._phase = Phase.READY
        self._backwards.backward_ended()
        self._lifetimes.forget_forwards()
        if at_boundary:
            with self._timers.phase("step"):
                self._update()
            if not self._streams.is_asynchronous:
                self._settle()
            self._reducer.reset()

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
            batch = self._endless = self._endless or self.dataloader.repeat()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for micro_batch in micro_batches(batch, self._batch.accumulation):
            loss = loss_in(call_with(self, on_device(micro_batch, self.device)))
            self.backward(loss)
            self.step()
            total += loss.detach().reshape(())
        return total / self._batch.accumulation

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

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block accumulate on this rank; the next one outside, or the step, reduces them all.

        Raises:
            RuntimeError: in stage 2, which has no room for gradients that are not reduced.
        """
        if self.config.zero_optimization.stage >= 2:
            raise RuntimeError(
                f"no_sync() needs full gradients on every rank, which ZeRO stage {self.config.zero_optimization.stage} "
                "does not keep: use stage 0 or 1, or gradient_accumulation_steps"
            )
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates the parameters."""
        if self._boundary_override is not None:
            return self._boundary_override
        return (self.micro_steps + 1) % self._batch.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decides by hand whether steps update; None: every `gradient_accumulation_steps`, as at the start.

        Gradients are divided by `gradient_accumulation_steps` in any case.
        """
        self._boundary_override = is_boundary

    def zero_grad(self) -> None:
        """Begins the step anew: drops the gradients since the last update, and what an interrupted backward left."""
        self._reducer.reset()
        self._backwards.backward_ended()
        self._lifetimes.forget_forwards()
        self._lifetimes.release_all()
        self.micro_steps -= self.micro_steps % self._batch.accumulation
        if self._phase is not Phase.DESTROYED:
            self._phase = Phase.READY

    def token_mean(self, loss_sum: Tensor, tokens_in_step: int) -> Tensor:
        """A micro-batch's loss such that the step's gradient is that of the mean over all tokens of all ranks.

        The engine averages over micro-batches and ranks; when these hold different numbers of valid tokens, that is
        not the mean over tokens. A collective: all ranks call it for each micro-batch.

        Args:
            loss_sum: summed loss of this micro-batch, a scalar.
            tokens_in_step: valid tokens of this rank in all micro-batches of the step together. If no rank has any,
                that is an error on the CPU, and on a GPU, where nobody waits for the sum, a step that is skipped.
        """
        total = torch.full((1,), float(tokens_in_step), dtype=torch.float64, device=self.device)
        self._communicator.all_reduce(total).wait()
        if not self._streams.is_asynchronous and not total.item():
            raise ValueError("token_mean(): no rank has a valid token in this step")
        factor = self._batch.accumulation * self._communicator.world_size / total
        return loss_sum * factor.to(torch.promote_types(loss_sum.dtype, torch.float32)).reshape(())

    # -- what a run is asked

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._streams.device

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return self._communicator.rank

    @property
    def local_rank(self) -> int:
        """This process among those of its host, as the launcher numbered it."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._communicator.world_size

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 outside float16."""
        return self._controller.loss_scale.scale

    @property
    def skipped_steps(self) -> int:
        """Updates skipped because gradients were not finite."""
        return self._controller.loss_scale.skipped_steps

    def train_batch_size(self) -> int:
        """Samples per update over all ranks."""
        return self._batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward of one rank."""
        return self._batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per update."""
        return self._batch.accumulation

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the last step's mean gradient over all parameters, before clipping; None before the first step."""
        return self._controller.last.grad_norm if self.global_steps else None

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        self._ledger.learn()
        return self._learning_rates()

    def module_state_dict(self, rank: int | None = None) -> dict[str, Any]:
        """The model's state dict with memory of its own (a plain `state_dict()` shares the flat buffers).

        In stage 3 a collective, unit by unit. `rank`: the one that wants it, where the others get an empty dict and
        need no memory for it; None: all.
        """
        self._gathers.wait()
        return clone_state_dict(self.module, wanted=rank in (None, self.global_rank))

    def load_module_state_dict(self, source: WeightSource, *, strict: bool = True, rank: int = 0) -> list[str]:
        """Gives the model the weights of a full state dict or of safetensors files, see `partita.zero.load_weights`."""
        self._gathers.wait()
        return load_weights(self.module, source, strict=strict, rank=rank)

    def save_model(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes the model's state dict to one safetensors file, which rank 0 writes and all ranks gather.

        No rank holds more than one unit of whole parameters at a time. The file appears when it is complete. Shared
        parameters are written under each of their names.

        Args:
            dtype: of the floating-point tensors; None: as the model computes. torch.float32 writes the masters of
                what is trained.

        Raises:
            ValueError: something in the state dict is no tensor, or safetensors has no such dtype.
            OSError: the file cannot be written; raised on all ranks.
        """
        self._gathers.wait()
        save_weights(self.module, path, dtype, self._access, self._communicator)

    def save_16bit_model(self, save_dir: str | os.PathLike[str], save_filename: str = "model.safetensors") -> None:
        """`save_model` in the dtype that the model computes in, under DeepSpeed's name."""
        self.save_model(Path(save_dir) / save_filename)

    def save_config(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole config as JSON, batch sizes resolved."""
        save_config(self.config, path)

    def destroy(self) -> None:
        """Lets go of the model: hooks are removed, buffers are freed with the last parameter that lies in them.

        In stage 3 the parameters of the model have no values any more: take `module_state_dict()` before.
        """
        if self._phase is Phase.DESTROYED:
            return
        self._phase = Phase.DESTROYED
        self._gathers.close()
        try:
            self._gathers.wait()
            self._ledger.learn()
            self._reducer.close()
        finally:  # the collectives under way may have failed
            self._lifetimes.close()
            if self._checkpoints is not None:
                self._checkpoints.close()
            self._units.clear()
            self._sharded = self.optimizer = self.lr_scheduler = None
            if self._gathering is not None:
                self._gathering.close()
            self._communicator.close()

    # -- parts

    def _predivide(self) -> float:
        """What gradients are divided by before they are summed over ranks."""
        if not self.config.prescale_gradients:
            return 1.0
        factor = self.config.gradient_predivide_factor
        return factor if factor != 1.0 else float(self.world_size)

    def _make_loader(self, data: Any, collate_fn: Callable[[list[Any]], Any] | None) -> ShardedLoader:
        return ShardedLoader(
            data,
            micro_batch_size=self._batch.micro,
            rank=self.global_rank,
            world_size=self.world_size,
            seed=self.config.seed,
            collate_fn=collate_fn,
        )

    def _learning_rates(self) -> list[float]:
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def _autocast_context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, self._autocast)

    def _plan_backward(self) -> BackwardPlan:
        self._lifetimes.begin_backward()
        reduces = self.is_gradient_accumulation_boundary() and not self._no_sync
        return BackwardPlan(reduces, self._backwards.missing_scale())

    def _end_backward(self) -> None:
        self._phase = Phase.BACKWARD
        self._lifetimes.end_backward()

    def _update(self) -> None:
        if self._sharded is None:
            raise RuntimeError("engine.step() has no optimizer: give initialize() one, or name one in the config")
        self._settle()
        self._lifetimes.release_all()
        self._guard.check()
        self._gathers.wait()  # of parameters that no forward has used since
        for flat in (*self._units, *self._frozen):
            flat.check_unwritten()
        for unit in self._units:
            unit.adopt_written_parameters()
        self._reducer.reduce_all()
        try:
            self._sharded.run(mean=self._mean, clip=self.config.gradient_clipping)
        except CommunicationError:
            self._gathers.abandon()
            raise
        if not self.config.zero_optimization.overlap_gather:
            self._gathers.wait()
        self.global_steps += 1
        self._ledger.enter(self.global_steps, self._controller.outcome(), self._reducer.take_finiteness())

    def _settle(self) -> None:
        """Acts on the outcome of the last step; if that ends the run, the gradients at hand go with it."""
        try:
            self._ledger.settle()
        except FloatingPointError:
            self._reducer.reset()
            raise

    def _announce(self, precision: str) -> None:
        if self.global_rank != 0:
            return
        numel = sum(p.numel() for unit in self._units for p in unit.parameters)
        optimizer = "no optimizer" if self._sharded is None else type(self._sharded.inner).__name__
        logger.info(
            "ZeRO stage %d, %d ranks over %s, %s, %s on %s; %s parameters in %d units; "
            "batch %d = %d x %d micro-batches x %d ranks",
            self.config.zero_optimization.stage,
            self.world_size,
            self._communicator.transport,
            precision,
            optimizer,
            self._streams.name,
            f"{numel:,}",
            len(self._units),
            self._batch.train,
            self._batch.micro,
            self._batch.accumulation,
            self.world_size,
        )
        if self.device.type == "cpu" and torch.cuda.device_count():
            logger.warning("the model is on the CPU and trains there; for a GPU: model.to('cuda') before initialize()")
        if self.config.dump_state:
            logger.info("config: %s", self.config.model_dump_json(indent=2))


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
