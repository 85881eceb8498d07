"""The engine of a pipeline: layers on several ranks, a whole step per call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from partita.comm import CommunicationError, Entries, Reduction, any_rank, note_rank, raise_together, require_same
from partita.config import ConfigError, ConfigSource, load_config
from partita.data import Reading, micro_batches, on_device
from partita.device import HOST
from partita.engine.agreement import model_entries
from partita.engine.arguments import config_of
from partita.engine.base import EngineBase
from partita.engine.phase import LifecycleError, Phase, require
from partita.engine.prepare import Given, Prepared, prepare
from partita.model import Accumulation, ModelPart
from partita.optim import OptimizerSource, SchedulerSource
from partita.pipeline import (
    Batches,
    Outbox,
    PipelineError,
    PipelineModule,
    PipelineStep,
    RankPlan,
    Schedule,
    Span,
    StagesHere,
    TiedWeights,
    WeightSplit,
    classes_of,
    fingerprint,
    forward_wave,
    pairs_of,
    placement,
    plan_of,
    require_queues,
    require_same_labels,
    schedule_for,
    share_values,
    to_text,
)
from partita.step import OptimizerStep

if TYPE_CHECKING:
    from partita.config import Config

_OF_A_STEP = (PipelineError, CommunicationError)  # errors that say that a step has begun


class PipelineEngine(EngineBase):
    """A `PipelineModule` in training.

    One step is `loss = engine.train_batch(iterator)`: `gradient_accumulation_steps` micro-batches go through the stages
    as the schedule says, and the parameters are updated. All ranks call the same methods in the same order.

    Each rank has the layers of its stages. So have `module_state_dict()` and `parameters()`; checkpoints and
    `save_model()` have the whole model.

    Args:
        model: its layers are built here, on the CPU, unless a program has asked for them before.
        model_parameters: of this rank's layers. Where it is param groups, all ranks give equally many, some of them
            perhaps empty.
        optimizer, train_data, lr_scheduler, config, collate_fn: as for `Engine`. A sample of the data is a pair
            (inputs, labels).

    Raises:
        ConfigError: the config does not make sense, or asks for what a pipeline cannot do; names the key.
        ScheduleError: there is no such schedule, or it does not fit the number of micro-batches.
        ValueError, TypeError: the model or the optimizer cannot be trained as asked; names the parameter or class.
    """

    def __init__(
        self,
        model: PipelineModule,
        optimizer: OptimizerSource = None,
        model_parameters: Iterable[Any] | None = None,
        train_data: Any = None,
        lr_scheduler: SchedulerSource = None,
        config: ConfigSource = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **config_names: ConfigSource,
    ) -> None:
        with ExitStack() as on_failure, ExitStack() as exits:
            on_failure.push(note_rank)
            settings = load_config(config_of(None, {"config": config, **config_names}))
            _refuse_unfit(settings)
            wish = settings.pipeline
            if wish.activation_checkpoint_interval:
                model.activation_checkpoint_interval = wish.activation_checkpoint_interval
            model.build(placement(wish.schedule, model.num_stages, wish.chunks))
            trained = [{"params": [p for p in model.parameters() if p.requires_grad]}]
            groups = trained if model_parameters is None else model_parameters
            given = Given(optimizer, groups, train_data, lr_scheduler, settings, collate_fn)
            given.check()
            ready = prepare(model, given, exits, on_failure, model.num_stages, _described(model))
            run = ready.run
            schedule = schedule_for(wish.schedule, model.num_stages, run.batch.accumulation, wish.chunks)
            require_same(run.grid.world, [("the pipeline's schedule", to_text(schedule))])
            require_same(run.grid.data, model_entries(model, ready.inner))
            self._plan = plan_of(schedule, run.grid.pipe.rank, model.skip_edges)
            self._here = _stages_here(model, self._plan, ready, exits)
            parts = list(self._here.parts.values())
            step = OptimizerStep(run, parts, ready.optimizer, ready.scheduler, ready.controller, ready.gathers, exits)
            exits.callback(ready.gathers.wait)
            super().__init__(run, model, parts, step, ready.optimizer, ready.scheduler, ready.loader, exits)
            on_failure.pop_all()
        self._trains = any_rank(run.grid.pipe, ready.optimizer is not None and any(part.units for part in parts))
        self._timeline: tuple[Span, ...] = ()
        self._forward_plans: dict[int, RankPlan] = {}
        self._reading = Reading()
        self._failure = ""

    # -- a step

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """One whole optimizer step; returns the mean loss of its micro-batches on all data-parallel copies, detached.

        Args:
            data_iter: an iterator over micro-batches, pairs (inputs, labels); a DataLoader, of which each call takes
                the next micro-batches, epoch after epoch; or one such pair that is split along dimension 0 into
                `gradient_accumulation_steps` parts. Ranks with the first or the last stage read it; others may give
                None. None: the engine's own `dataloader`.

        Raises:
            ValueError, TypeError: the data end early, are no pairs, or the first and the last stage read different
                labels; on all ranks. Nothing has begun.
            PipelineError: an action has failed; names rank, stage, micro-batch and action, on all ranks of the
                pipeline. The engine cannot go on: ranks may have got different messages.
        """
        self._require("train_batch()")
        if torch.is_inference_mode_enabled():
            raise LifecycleError("engine.train_batch() was called inside torch.inference_mode(): call it outside")
        if not self._trains:
            raise RuntimeError(
                "train_batch(): nothing is trained: there is no optimizer (give initialize() one, or name one in the "
                "config), or every parameter of the model is frozen"
            )
        with self._calls.inside("train_batch()"), self._left_on_error():
            batches = self._batches(data_iter, self._run.batch.accumulation, "train_batch")
            step = PipelineStep(self._here, self._plan, batches)
            with self._step.timers.phase("pipeline"), self._left_on_error((BaseException,)):
                step.train()
            for m in range(self._run.batch.accumulation):
                self._step.add_work(batches.inputs[m : m + 1])
            self._timeline = tuple(step.spans)
            self._watching.add_actions((str(span.action), span.start, span.end) for span in step.spans)
            self._beside.before_update()
            self._step.update()
            loss = self._step.controller.mean_loss()
        self._after_update()
        return loss

    def eval_batch(self, data_iter: Any = None, num_micro_batches: int | None = None) -> Tensor:
        """The mean loss of some micro-batches on all data-parallel copies, in evaluation mode and without gradients.

        Args:
            data_iter: as for `train_batch()`.
            num_micro_batches: None: `gradient_accumulation_steps`.

        Raises:
            ValueError, TypeError, PipelineError: as for `train_batch()`.
        """
        self._require("eval_batch()")
        count = self._run.batch.accumulation if num_micro_batches is None else num_micro_batches
        if count < 1:
            raise ValueError(f"eval_batch(): num_micro_batches = {count}: give 1 or more")
        with self._calls.inside("eval_batch()"), self._left_on_error(), self._evaluating():
            batches = self._batches(data_iter, count, "eval_batch")
            step = PipelineStep(self._here, self._forward_plan(count), batches)
            with self._left_on_error((BaseException,)):
                step.evaluate()
            sums = torch.zeros(2, dtype=torch.float64, device=self.device)
            for loss in step.losses:
                sums[0] += loss.reshape(())
            sums[1] = len(step.losses)
            self._run.grid.world.all_reduce(sums).wait()
        return (sums[0] / sums[1]).float()

    def timeline(self) -> tuple[Span, ...]:
        """The actions of the last `train_batch()` on this rank, with their times in seconds of a clock of its own.
        Waiting is not part of an action; on a GPU the times are those of the host."""
        return self._timeline

    @property
    def schedule(self) -> Schedule:
        """What all ranks of the pipeline do in a step."""
        return self._plan.schedule

    def is_first_stage(self) -> bool:
        """Whether this rank has the first stage, and reads inputs."""
        return 0 in self._here.parts

    def is_last_stage(self) -> bool:
        """Whether this rank has the last stage, and reads labels."""
        return self._plan.schedule.num_stages - 1 in self._here.parts

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a rank has some of the layers only."""
        self._refuse_call("engine(batch)")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: `train_batch()` runs all backwards."""
        self._refuse_call("engine.backward(loss)")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: `train_batch()` takes the step."""
        self._refuse_call("engine.step()")

    def _refuse_call(self, call: str) -> NoReturn:
        raise LifecycleError(
            f"{call}: micro-batches of a pipeline are under way together: call engine.train_batch(iterator) for a "
            "whole step, and engine.eval_batch(iterator) to evaluate"
        )

    # -- around a step

    def _require(self, call: str) -> None:
        if self._failure:
            raise LifecycleError(f"engine.{call}: this engine has failed and cannot go on ({self._failure})")
        phase = Phase.DESTROYED if self._is_destroyed else Phase.TORN if self._is_torn else Phase.READY
        require(call, phase, Phase.READY)

    def _batches(self, data_iter: Any, count: int, call: str) -> Batches:
        """The micro-batches of a step; all ranks learn their classes, or that a rank has none."""
        pairs: list[tuple[Any, Any]] = []
        error: Exception | None = None
        tied = self._here.ties.trained_here()
        told = torch.tensor([0.0] * (count + 3) + tied, dtype=torch.float64, device=HOST)
        inputs: list[Any] = []
        labels: list[Any] = []
        try:
            if data_iter is not None or self.dataloader is not None:
                own = self.dataloader if data_iter is None else data_iter
                if data_iter is None or self.is_first_stage() or self.is_last_stage():
                    pairs = [
                        _pair(batch, call) for batch in micro_batches(self._reading.source(own, None, call), count)
                    ]
            elif self.is_first_stage() or self.is_last_stage():
                raise ValueError(f"{call}() needs an iterator over micro-batches: the engine was given no train_data")
            if self.is_first_stage():
                for m, number in enumerate(classes_of([inputs for inputs, _ in pairs])):
                    told[3 + m] = number
                inputs = [on_device(x, self.device) for x, _ in pairs]
                told[1] = fingerprint([y for _, y in pairs])
            if self.is_last_stage():
                labels = [on_device(y, self.device) for _, y in pairs]
                told[2] = fingerprint([y for _, y in pairs])
        except Exception as failure:
            error = failure
            told[0] = 1
        pipe = self._run.grid.pipe
        told = pipe.to_device(told)
        pipe.all_reduce(told, Reduction.max).wait()
        failed, first, last, *rest = pipe.to_host(told).tolist()
        if not failed:
            try:
                require_same_labels(first, last)
                self._here.ties.require_all_trained_or_none(rest[count:])
            except ValueError as difference:
                error = difference
        if any_rank(self._run.grid.world, bool(failed) or error is not None):  # copies that have data would wait
            raise_together(self._run.grid.world, error, f"{call}():")
        return Batches(inputs, labels, [int(number) for number in rest[:count]])

    def _forward_plan(self, count: int) -> RankPlan:
        if count not in self._forward_plans:
            schedule = forward_wave(self._plan.schedule.stage_ranks, count)
            self._forward_plans[count] = plan_of(schedule, self._plan.rank, self._here.module.skip_edges)
        outbox = self._here.outbox
        outbox.room = max(outbox.room, self._forward_plans[count].room)
        return self._forward_plans[count]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modules = [*self.module.modules(), *self._here.module.stages.values()]  # a stage is no child of the module
        training = [module for module in modules if module.training]
        self.module.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _left_on_error(self, kinds: tuple[type[BaseException], ...] = _OF_A_STEP) -> Iterator[None]:
        """An error of an action or of a collective ends the engine: no rank can know what the others have done. They
        learn why."""
        try:
            yield
        except kinds as error:
            said = str(error).partition("\n")[0]
            self._failure = self._failure or (
                said if isinstance(error, _OF_A_STEP) else f"{type(error).__name__} {said}".strip()
            )
            for communicator in (self._run.grid.pipe, self._run.grid.data, self._run.grid.world):
                communicator.leave(f"it failed: {self._failure}")
            raise


def _pair(batch: Any, call: str) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise TypeError(
        f"{call}(): a micro-batch is a {what}: a pipeline needs pairs (inputs, labels), as its first stage gets the "
        "inputs and its last one the labels; several tensors go in a tuple or a dict"
    )


def _described(model: PipelineModule) -> Entries:
    """What all ranks know of the model."""
    return [
        ("the number of ranks in a pipeline", str(model.num_stages)),
        *((f"layer {i}", name) for i, name in enumerate(model.layer_names)),
        ("the layers of each stage", str([(run.start, run.stop) for run in model.bounds])),
        ("the skips between layers", str(sorted(model.skips.items()))),
    ]


def _refuse_unfit(config: Config) -> None:
    """Raises ConfigError, naming the key, for what a pipeline cannot do."""
    if config.zero_optimization.stage == 3:
        raise ConfigError(
            "zero_optimization.stage = 3: a pipeline partitions optimizer states and gradients, and not parameters, in "
            "this version: use stage 0, 1 or 2; more stages of the pipeline have fewer parameters each"
        )
    if config.activation_checkpointing.enabled:
        raise ConfigError(
            "activation_checkpointing.enabled: in a pipeline set pipeline.activation_checkpoint_interval, or give it "
            "to PipelineModule"
        )


def _stages_here(model: PipelineModule, plan: RankPlan, ready: Prepared, exits: ExitStack) -> StagesHere:
    """The stages of this rank in training. A collective of the pipeline."""
    run, ranks = ready.run, model.stage_ranks
    if run.device.type == "cuda":
        require_queues(plan, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
    run.grid.pipe.connect_pairs(pairs_of(plan, [tie.stages for tie in model.ties]))
    share_values(model.ties, ranks, model.stages, run.grid.pipe)
    parts: dict[int, ModelPart] = {}
    splits: dict[int, WeightSplit] = {}
    for number, stage in model.stages.items():
        accumulation = Accumulation(run.batch.accumulation, run.policy, reduces_at_boundary=False)
        names = {name for name, _ in stage.named_parameters()}
        replicas = {name: first for name, first in model.replicas.items() if name in names}
        parts[number] = ModelPart(stage, ready.inner, run, ready.scaling, accumulation, ready.gathers, exits, replicas)
        if plan.splits(number):
            splits[number] = WeightSplit(stage, exits)
    ties = TiedWeights(model.ties, ranks, parts, run.grid.pipe)
    ties.require_same_groups()
    grid = run.grid
    name = f"rank {grid.world.rank}"
    if grid.data.world_size > 1:
        name += f" (rank {grid.pipe.rank} of its pipeline)"
    outbox = Outbox(grid.pipe, plan.room)
    return StagesHere(name, model, parts, splits, ties, grid.pipe, outbox, ready.scaling, ready.controller.add_loss)
