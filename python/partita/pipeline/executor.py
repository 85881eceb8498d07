"""Runs the actions of one rank, whatever schedule they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from partita.comm import Communicator
from partita.model import LossScaling, ModelPart
from partita.pipeline.arrival import Arrival
from partita.pipeline.mail import Mail
from partita.pipeline.module import PipelineModule
from partita.pipeline.outbox import Outbox
from partita.pipeline.rank_plan import PlannedAction, RankPlan
from partita.pipeline.schedule import Action
from partita.pipeline.simulate import Span
from partita.pipeline.tied import TiedWeights
from partita.pipeline.weight_split import Deferred, WeightSplit

NAMES = {"F": "forward", "B": "backward", "I": "backward for the inputs", "W": "backward for the weights"}
Place = tuple[int, int]  # stage, micro-batch


class PipelineError(RuntimeError):
    """A step of a pipeline cannot go on; says on which rank, in which stage, micro-batch and action, and why."""


@dataclass(frozen=True)
class StagesHere:
    """What a rank has of a pipeline.

    name: of the rank, for errors. parts, splits: by stage; of the stages whose weight gradients may wait. report_loss:
    gets the loss of each micro-batch in training, where the last stage is.
    """

    name: str
    module: PipelineModule
    parts: Mapping[int, ModelPart]
    splits: Mapping[int, WeightSplit]
    ties: TiedWeights
    pipe: Communicator
    outbox: Outbox
    scaling: LossScaling
    report_loss: Callable[[Tensor], None]


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step.

    inputs, labels: where this rank has the first stage, and the last one; elsewhere empty. classes: of each
    micro-batch, the same on all ranks; those of one class have inputs of the same shapes.
    """

    inputs: Sequence[Any]
    labels: Sequence[Any]
    classes: Sequence[int]


@dataclass(frozen=True)
class _Open:
    """A stage and micro-batch between forward and backward. taken: the inputs whose gradients are given back, by the
    stage that they came from. given: the outputs whose gradients come, by the stage that has taken them."""

    taken: dict[int, list[Arrival]]
    given: dict[int, list[Tensor]]
    loss: Tensor | None


class PipelineStep:
    """One step of one rank: the actions of a plan over micro-batches.

    Attributes:
        spans: the actions so far, with their times on this rank in seconds, without what they have waited for.
        losses: of the micro-batches so far, detached, where the last stage is.
    """

    def __init__(self, here: StagesHere, plan: RankPlan, batches: Batches) -> None:
        self.spans: list[Span] = []
        self.losses: list[Tensor] = []
        self._here = here
        self._plan = plan
        self._batches = batches
        self._mail = Mail(here.pipe, here.outbox, batches.classes)
        self._last = plan.schedule.num_stages - 1
        self._open: dict[Place, _Open] = {}
        self._deferred: dict[Place, Deferred] = {}

    @torch.enable_grad()
    def train(self) -> None:
        """All forwards and backwards. The reductions of all gradients have begun afterwards.

        Raises:
            PipelineError: an action has failed here, or has waited in vain for another rank.
        """
        self._run()
        ties = self._here.ties
        try:
            ties.sum_gradients()
        except Exception as error:
            raise PipelineError(f"{self._here.name}, the gradients of tied weights: {_in_words(error)}") from error
        for stage in sorted(ties.stages):
            self._here.parts[stage].reduce()

    @torch.no_grad()
    def evaluate(self) -> None:
        """All forwards.

        Raises:
            PipelineError: an action has failed here, or has waited in vain for another rank.
        """
        self._run()

    def _run(self) -> None:
        for planned in self._plan.actions:
            try:
                self._mail.receive(planned.receives)
                self._act(planned)
            except Exception as error:
                kind, stage, m = planned.action
                where = f"{self._here.name}, stage {stage}, micro-batch {m}, {NAMES[kind]} ({planned.action})"
                raise PipelineError(f"{where}: {_in_words(error)}") from error
        self._here.outbox.finish()

    def _act(self, planned: PlannedAction) -> None:
        kind, stage, _ = planned.action
        if kind == "F":
            self._forward(planned.action)
        elif kind == "W":
            self._weights(planned.action)
        else:
            self._backward(planned.action)
        part = self._here.parts[stage]
        if kind in "BW":
            part.accumulation.advance()
        if planned.is_last_of_stage and stage not in self._here.ties.stages:
            part.reduce()

    @contextmanager
    def _timed(self, action: Action) -> Iterator[None]:
        """In this block an action computes."""
        begin = perf_counter()
        yield
        self.spans.append(Span(action, begin, perf_counter()))

    def _rank_of(self, stage: int) -> int | None:
        """The rank that has a stage; None: this one."""
        rank = self._plan.schedule.stage_ranks[stage]
        return None if rank == self._here.pipe.rank else rank

    def _forward(self, action: Action) -> None:
        _, stage, m = action
        x, skipped, taken = self._taken(stage, m)
        labels = self._batches.labels[m] if stage == self._last else None
        with self._timed(action):
            output, outputs_of = self._here.parts[stage].forward(x, skipped, labels)
        given: dict[int, list[Tensor]] = {}
        loss = None
        if stage == self._last:
            loss = _checked_loss(output)
            self.losses.append(loss.detach())
        for taker in self._plan.links.after[stage]:
            beside = [outputs_of[layer] for layer in self._here.module.carried(stage, taker)]
            payload = ([output] if taker == stage + 1 else [], beside)
            given[taker] = self._mail.give(("F", stage, m, taker), payload, self._rank_of(taker))
        if torch.is_grad_enabled():
            if loss is not None:
                self._here.report_loss(loss)
            self._open[stage, m] = _Open(taken, given, loss)

    def _taken(self, stage: int, m: int) -> tuple[Any, dict[int, Any], dict[int, list[Arrival]]]:
        """The input of a stage, the outputs of layers of earlier stages beside it, and what of both needs gradients."""
        x = self._batches.inputs[m] if stage == 0 else None
        skipped: dict[int, Any] = {}
        taken: dict[int, list[Arrival]] = {}
        for source in self._plan.links.before[stage]:
            (output, beside), taken[source] = self._mail.take(("F", source, m, stage))
            if source == stage - 1:
                (x,) = output
            skipped.update(zip(self._here.module.carried(source, stage), beside, strict=True))
        return x, skipped, taken

    def _backward(self, action: Action) -> None:
        kind, stage, m = action
        part, done = self._here.parts[stage], self._open.pop((stage, m))
        roots: list[Tensor] = []
        grads: list[Tensor] | None = None
        if done.loss is not None:
            roots = [self._here.scaling.scale(done.loss)]
        else:
            grads = []
            for taker, outputs in done.given.items():
                roots += outputs
                grads += self._mail.take_back(("B", taker, m, stage))
        splitting = self._here.splits[stage].collecting() if kind == "I" else nullcontext()
        with self._timed(action), splitting as deferred:
            part.backward(roots, grads)
        if deferred is not None:
            self._deferred[stage, m] = deferred
        part.forget()
        for source, inputs in done.taken.items():
            gradients = [x.take_gradient() for x in inputs]
            self._mail.give_back(("B", stage, m, source), gradients, self._rank_of(source))

    def _weights(self, action: Action) -> None:
        _, stage, m = action
        part = self._here.parts[stage]
        with self._timed(action):
            for parameter, gradient in self._deferred.pop((stage, m)).gradients():
                part.reducer.add(parameter, gradient)


def _checked_loss(output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise TypeError(
        f"the last stage gives {what}: give PipelineModule a loss_fn(outputs, labels) that returns the mean loss of "
        "the micro-batch, a scalar tensor, or let the last layer return it"
    )


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
