"""What every engine answers, keeps and ends, whatever its schedule."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from partita.config import save_config
from partita.data import ShardedLoader
from partita.engine.as_module import AsModule
from partita.model import ModelPart, RandomState, Section, TrainState, clone_state_dict, save_weights
from partita.optim import HyperParameters, ShardedOptimizer
from partita.run import Run
from partita.step import OptimizerStep
from partita.zero import WeightSource, load_weights

logger = logging.getLogger("partita")


class EngineBase(AsModule):
    """A model in training.

    An engine composes what others made; it has no arithmetic of its own. A subclass adds its calls and overrides
    nothing.

    Attributes:
        module: the model as the program gave it.
        config: with all batch sizes filled in.
        optimizer, lr_scheduler, dataloader: None where there is none.

    Args:
        exits: undoes what was made for the engine; the engine's own once it is complete.
    """

    def __init__(
        self,
        run: Run,
        module: nn.Module,
        parts: Sequence[ModelPart],
        step: OptimizerStep,
        optimizer: ShardedOptimizer | None,
        lr_scheduler: Any,
        dataloader: ShardedLoader | None,
        exits: ExitStack,
    ) -> None:
        super().__init__(module)
        self.config = run.config
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.dataloader = dataloader
        self._run = run
        self._parts = list(parts)
        self._step = step
        self._calls = run.grid.calls
        self._is_destroyed = False
        self._announce()
        self._exits = exits.pop_all()  # the last thing that may fail is done

    # -- what a run is asked

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._run.device

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return self._run.grid.world.rank

    @property
    def local_rank(self) -> int:
        """This process among those of its host, as the launcher numbered it."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._run.grid.world.world_size

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, the skipped ones too."""
        return self._step.global_steps

    @property
    def global_samples(self) -> int:
        """Samples of these steps, over all ranks."""
        return self._step.global_samples

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward; 1 outside float16."""
        return self._step.controller.loss_scale.scale

    @property
    def skipped_steps(self) -> int:
        """Updates skipped because gradients were not finite."""
        return self._step.controller.loss_scale.skipped_steps

    def train_batch_size(self) -> int:
        """Samples per update over all ranks."""
        return self._run.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward of one rank."""
        return self._run.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per update."""
        return self._run.batch.accumulation

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the last step's mean gradient over all parameters, before clipping; None before the first step."""
        return self._step.grad_norm()

    def get_lr(self) -> list[float]:
        """The learning rate of each param group."""
        self._step.learn()
        return self._step.learning_rates()

    # -- weights and state

    def module_state_dict(self, rank: int | None = None) -> dict[str, Any]:
        """The model's state dict with memory of its own (a plain `state_dict()` shares the flat buffers).

        In stage 3 a collective, unit by unit.

        Args:
            rank: the one that wants it. The others get an empty dict and need no memory for it. None: all want it.
        """
        with self._call_of_all("module_state_dict()") if self._run.policy.shards_params else nullcontext():
            self._wait_for_parameters()
            return clone_state_dict(self.module, wanted=rank in (None, self.global_rank))

    def load_module_state_dict(self, source: WeightSource, *, strict: bool = True, rank: int = 0) -> list[str]:
        """Gives the model the weights of a full state dict or of safetensors files, see `partita.zero.load_weights`."""
        with self._call_of_all("load_module_state_dict()"):
            self._wait_for_parameters()
            return load_weights(self.module, source, strict=strict, rank=rank)

    def sync_buffers(self) -> None:
        """All ranks have rank 0's buffers, BatchNorm's statistics say: those that a state dict has. A collective.

        The engine does that after every update. A program calls it where it has changed buffers otherwise and evaluates
        or saves before the next update.
        """
        for part in self._parts:
            part.share_buffers()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's state dict as any module gives it, names with "module."; its tensors are the parameters.

        Raises:
            RuntimeError: parameters are partitioned (stage 3): `module_state_dict()` gathers them.
        """
        self._wait_for_parameters()
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Gives the model the weights of a dict with the names of `state_dict()`; a collective, rank 0's values count.

        Raises:
            ValueError: names or shapes do not fit, or `assign` is asked for.
        """
        if assign:
            raise ValueError("load_state_dict(assign=True) would replace parameters that are trained: leave assign out")
        bare = next((name for name in state_dict if not name.startswith("module.")), None)
        if bare is not None:
            raise ValueError(
                f"'{bare}' does not begin with 'module.', as the names of engine.state_dict() do: give a state dict of "
                "the model to engine.load_module_state_dict()"
            )
        state = {name.removeprefix("module."): value for name, value in state_dict.items()}
        missing = self.load_module_state_dict(state, strict=strict)
        unexpected = state.keys() - self.module.state_dict(keep_vars=True).keys()
        return _IncompatibleKeys([f"module.{name}" for name in missing], [f"module.{name}" for name in unexpected])

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
        with self._call_of_all("save_model()"):
            self._wait_for_parameters()
            save_weights(self.module, path, dtype, self._run.grid.data)

    def save_16bit_model(self, save_dir: str | os.PathLike[str], save_filename: str = "model.safetensors") -> None:
        """`save_model` in the dtype that the model computes in, under DeepSpeed's name."""
        with self._call_of_all("save_16bit_model()"):
            self.save_model(Path(save_dir) / save_filename)

    def save_config(self, path: str | os.PathLike[str] = "partita_config.json") -> Path:
        """Writes the whole config as JSON, batch sizes resolved; returns the path."""
        save_config(self.config, path)
        return Path(path)

    def train_state(self) -> TrainState:
        """Everything that must survive a restart.

        Raises:
            TypeError: the lr_scheduler has no state that could be saved.
        """
        sections = [Section("step", self._step)]
        for i, part in enumerate(self._parts):
            sections.append(Section(f"accumulation.{i}" if i else "accumulation", part.accumulation))
        if self.optimizer is not None and self._step.sharded is not None:
            sections.append(Section("optimizer", HyperParameters(self.optimizer)))
            sections.append(Section("optimizer_states", self._step.sharded.update))
        if self.lr_scheduler is not None:
            if not hasattr(self.lr_scheduler, "state_dict"):
                name = type(self.lr_scheduler).__name__
                raise TypeError(f"lr_scheduler: a {name} has no state_dict(), so it could not go on after a restart")
            sections.append(Section("lr_scheduler", self.lr_scheduler))
        if self.dataloader is not None:
            sections.append(Section("data", self.dataloader))
        sections.append(Section("random", RandomState(self.device)))
        return TrainState(self._parts, sections, self._run.grid.world)

    def destroy(self) -> None:
        """Lets go of the model: hooks are removed, groups are left, and buffers are freed with the last parameter that
        lies in them.

        In stage 3 the parameters of the model have no values any more: take `module_state_dict()` before.
        """
        if self._is_destroyed:
            return
        self._is_destroyed = True
        unfinished = max(part.accumulation.unfinished for part in self._parts)
        if unfinished and self._run.is_first:
            logger.warning(
                f"the run ends {_count(unfinished, 'micro-batch')} into a step of {self._run.batch.accumulation} "
                "(gradient_accumulation_steps), whose gradients are in no update: give each step all its micro-batches"
            )
        try:
            self._exits.close()
        finally:
            self.optimizer = self.lr_scheduler = None
            self._parts.clear()

    # -- for engines

    def _call_of_all(self, name: str) -> AbstractContextManager[None]:
        """The block of a call that is a collective; other ranks in other calls are named."""
        return self._run.grid.world.call_of_all(name)

    def _wait_for_parameters(self) -> None:
        for part in self._parts:
            part.gathers.wait()

    def _announce(self) -> None:
        if not self._run.is_first:
            return
        units = [unit for part in self._parts for unit in part.units]
        optimizer = "no optimizer" if self.optimizer is None else type(self.optimizer.inner).__name__
        batch = self._run.batch
        over = f" over {self._run.grid.world.transport}" if self.world_size > 1 else ""
        numel = sum(p.numel() for unit in units for p in unit.parameters)
        trained = f"{_count(numel, 'parameter')} in {_count(len(units), 'unit')}" if numel else "nothing is trained"
        limit = self.config.gradient_clipping  # said in any case: DeepSpeed clips when the config does not have the key
        clipped = f"gradients clipped at norm {limit:g}" if limit else "gradients not clipped"
        logger.info(
            f"ZeRO stage {self._run.policy.stage}, {_count(self.world_size, 'rank')}{over}, "
            f"{self._run.precision.name}, {optimizer} on {self._run.streams.name}; {trained}; {clipped}; "
            f"batch {batch.train} = {batch.micro} x {_count(batch.accumulation, 'micro-batch')} "
            f"x {_count(self._run.grid.data.world_size, 'rank')}"
        )
        if self.device.type == "cpu" and torch.cuda.device_count():
            logger.warning("the model is on the CPU and trains there; for a GPU: model.to('cuda') before initialize()")
        if self.config.dump_state:
            logger.info("config: %s", self.config.model_dump_json(indent=2))


def _count(number: int, thing: str) -> str:
    plural = "" if number == 1 else "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{plural}"
