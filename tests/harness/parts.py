"""A model in two parts, trained without an engine: what a rank of a pipeline with two chunks would do."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from partita.model import Accumulation, LossScaling, ModelPart, clone_state_dict
from partita.optim import ShardedOptimizer, StepController, choose_optimizer
from partita.run import begin_run, loss_scaler_of
from partita.step import OptimizerStep
from partita.units import ParameterGathers
from torch import Tensor, nn


class Halves:
    """The two children of a model, each a `ModelPart`; one optimizer over both.

    Each part counts its own micro-batches, so that it reduces in the last of its own backwards.
    """

    def __init__(self, model: nn.Sequential, config: dict[str, Any]) -> None:
        with ExitStack() as exits:
            run = begin_run(config, torch.device("cpu"), exits)
            inner = choose_optimizer(None, model, None, run.config)
            assert inner is not None
            controller = StepController(loss_scaler_of(run.config, run.precision), run.streams, run.world_size)
            self.scaling = LossScaling(controller.scale if run.precision.scales_loss else None)
            gathers = ParameterGathers(run.streams)
            self.parts = [
                ModelPart(
                    half, inner, run, self.scaling, Accumulation(run.batch.accumulation, run.policy), gathers, exits
                )
                for half in model
            ]
            self.step = OptimizerStep(run, self.parts, ShardedOptimizer(inner), None, controller, gathers, exits)
            self._exits = exits.pop_all()

    def end(self, part: ModelPart) -> None:
        """A micro-batch of a part is over."""
        part.forget()
        part.accumulation.advance()

    def weights(self) -> dict[str, Tensor]:
        """As the state dict of the model has them."""
        state = [clone_state_dict(part.module) for part in self.parts]
        return {f"{i}.{name}": value for i, half in enumerate(state) for name, value in half.items()}

    def close(self) -> None:
        """Lets go of the model."""
        self._exits.close()
