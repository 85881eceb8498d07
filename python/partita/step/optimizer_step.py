"""One optimizer step: from the gradients of all parts of a model to its new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from partita.comm import CommunicationError, error_under_way, require_same
from partita.model import ModelPart
from partita.monitor import Monitor, PhaseTimers, tokens_in
from partita.optim import ShardedOptimizer, ShardedStep, StepController, group_entries
from partita.run import Run
from partita.step.outcomes import StepOutcomes
from partita.step.schedule import WatchedSchedule
from partita.step.skips import SkipGuard
from partita.units import ParameterGathers


class OptimizerStep:
    """Updates all parts of a model together, and acts on what became of it.

    Args:
        parts: with the optimizer's parameters.
        optimizer: None: nothing is trained, and `update()` raises.
        scheduler: has step(), called after every update that was not skipped; None: the learning rate stays.
        controller: decides about a step.
        gathers: as the parts have it.
        exits: ends the step's hold on the optimizer.
    """

    _micro_steps = 0  # of all parts, at the last update
    _micro_batches = 0  # of the last update
    _tokens_then = 0  # in the micro-batch whose operations were counted

    def __init__(
        self,
        run: Run,
        parts: Sequence[ModelPart],
        optimizer: ShardedOptimizer | None,
        scheduler: Any,
        controller: StepController,
        gathers: ParameterGathers,
        exits: ExitStack,
    ) -> None:
        self.global_steps = self.global_samples = 0
        self.clip = run.config.gradient_clipping  # the largest norm of the mean gradient; 0: no clipping
        self.sharded: ShardedStep | None = None
        self._run, self._parts = run, list(parts)
        self.controller, self._optimizer, self._gathers = controller, optimizer, gathers
        self.monitor = Monitor(run, exits)
        self.timers = PhaseTimers(self.monitor.times_phases, run.streams)
        self._reducers = [part.reducer for part in parts]
        self._skips = SkipGuard(
            controller.scaler,
            self._reducers,
            run.grid.world,
            scales_loss=run.precision.scales_loss,
            limit=run.config.max_consecutive_skipped_steps,
            lag=1 if run.streams.is_asynchronous else 0,
        )
        self.schedule = None if scheduler is None else WatchedSchedule(scheduler, optimizer, warns=run.is_first)
        self._outcomes = StepOutcomes(
            self.schedule,
            self.learning_rates,
            self.monitor,
            self.timers,
            self._skips,
            scales_loss=run.precision.scales_loss,
            refuse_difference=self._refuse_difference,
        )
        if optimizer is not None:
            units = [unit for part in parts for unit in part.units]
            self.sharded = ShardedStep(optimizer.inner, optimizer, units, run, controller, gathers)
            exits.callback(self.sharded.close)
            if not run.policy.shards_states:
                optimizer.give_states(self.sharded.update.states)
        exits.callback(self._close)

    def update(self) -> None:
        """Takes a step with the gradients of all backwards since the last one.

        On a GPU this queues the work, and what became of the step is learned during the next one.

        Raises:
            RuntimeError: there is no optimizer, or the update would not reach the parameters that the model uses, or
                ranks took a step with different hyper-parameters.
            FloatingPointError: the run skips its steps and does nothing else.
            CommunicationError: a rank is gone.
        """
        with self.timers.phase("step"):
            sharded = self._update()
        try:
            sharded.finish()
        finally:  # a hook of the program may raise: the step was taken all the same
            self._complete()

    def _update(self) -> ShardedStep:
        if self.sharded is None:
            raise RuntimeError("engine.step() has no optimizer: give initialize() one, or name one in the config")
        self._settle()
        for part in self._parts:
            part.before_update()
        try:
            self.sharded.run(mean=self._run.mean, clip=self.clip, micro_batches=self._count_micro_batches())
        except CommunicationError:
            self._gathers.abandon()
            raise
        if self.sharded.is_followed or not self._run.config.zero_optimization.overlap_gather:
            self._gathers.wait()
        for part in self._parts:
            part.share_buffers_after_update()
        return self.sharded

    def _complete(self) -> None:
        """The step is counted, and its gradients are done with."""
        self.global_steps += 1
        self.global_samples += self._run.batch.train
        self.timers.end_step()
        finiteness = [seen for part in self._parts for seen in part.reducer.packing.take_finiteness()]
        self._outcomes.enter(self.global_steps, self.controller.outcome(), finiteness)
        if not self._run.streams.is_asynchronous:
            self._settle()
        self._drop_gradients()

    def add_work(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """A micro-batch with these inputs was or will be trained; none: this rank does not have them."""
        each = self._run.config.monitor.tokens_per_sample
        if each is not None:
            tokens = each * self._run.batch.micro if args or kwargs else 0
        else:
            tokens = tokens_in(args, kwargs or {})
        flops = sum(part.flops for part in self._parts)
        if tokens and flops:  # counted with the first micro-batch
            self._tokens_then = self._tokens_then or tokens
            flops *= tokens / self._tokens_then
        self.controller.add_work(tokens, flops)

    def learn(self) -> None:
        """The learning rate and the reports are those of the last step. On a GPU the host waits for it."""
        self._outcomes.learn()

    def learning_rates(self) -> list[float]:
        """Of each param group, as they are now."""
        return [] if self._optimizer is None else [float(group["lr"]) for group in self._optimizer.param_groups]

    def grad_norm(self) -> float | None:
        """2-norm of the last step's mean gradient, before clipping; None before the first step."""
        return self.controller.last.grad_norm if self.global_steps else None

    @property
    def last_known_was_skipped(self) -> bool:
        """Whether the last step whose outcome is known was skipped. Nobody waits."""
        return self._outcomes.was_skipped

    def was_applied(self) -> bool:
        """Whether the last update was not skipped; False before the first one. On a GPU the host waits for it."""
        return self.global_steps > 0 and not self.controller.last.skip

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and samples, and the loss scale with its counters."""
        self.learn()
        counts = {"global_steps": self.global_steps, "global_samples": self.global_samples}
        return {**counts, **self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the state of a run; what became of an earlier step of this one is of no interest any more."""
        self.global_steps, self.global_samples = state["global_steps"], state["global_samples"]
        self.controller.load_state_dict(state)
        self._outcomes.forget()
        self.monitor.go_on_from(self.global_steps, self.global_samples)
        self._skips.look_ahead(self.controller.loss_scale)

    def _settle(self) -> None:
        """Acts on the outcome of the last step; if that ends the run, the gradients at hand go with it."""
        try:
            self._outcomes.settle()
        except CommunicationError:  # the engine is over, and gradients may be under way for ever
            raise
        except Exception:
            self._drop_gradients()
            raise

    def _count_micro_batches(self) -> int:
        """Those of this rank since the last update."""
        now = max(part.accumulation.micro_steps for part in self._parts)
        self._micro_steps, self._micro_batches = now, now - self._micro_steps
        return self._micro_batches

    def _refuse_difference(self, step: int) -> None:
        """Says on all ranks what differs. A collective."""
        assert self._optimizer is not None
        count = ("the number of micro-batches (set_gradient_accumulation_boundary())", str(self._micro_batches))
        try:
            trained = [
                (f"requires_grad of parameter {slot.name}", str(slot not in frozen))
                for part in self._parts
                for unit in part.units
                for frozen in [unit.frozen_slots()]
                for slot in unit.layout.slots
                if self._run.grid.shape.pipe == 1
            ]
            require_same(self._run.grid.world, [count, *group_entries(self._optimizer.inner), *trained])
        except ValueError as error:
            raise RuntimeError(f"step {step}: {error}; change it on all ranks alike") from None
        raise RuntimeError(
            f"step {step} was taken with hyper-parameters that differed between ranks, and that are the same again by "
            "now: change them on all ranks alike"
        )

    def _drop_gradients(self) -> None:
        self.controller.forget_told()
        for part in self._parts:
            part.drop_gradients()

    def _close(self) -> None:
        try:
            self._outcomes.close(waits=not self._run.grid.calls.has_failed and error_under_way() is None)
        finally:  # a program may keep the engine, and nothing that is large with it
            if self._optimizer is not None:
                self._optimizer.give_states(None)
            self.sharded = self._optimizer = self.schedule = None
            self._parts.clear()
            self._reducers.clear()
