"""DeepSpeed's engines: what programs call, over an engine of Partita."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import partita
from partita.compat.deepspeed._absent import absent_attribute
from partita.compat.deepspeed._answers import ConfigAnswers
from partita.compat.deepspeed._arguments import (
    OF_ENGINE,
    OF_INITIALIZE,
    folder_of,
    for_partita,
    model_in,
    require_own_checkpoint,
)
from partita.compat.deepspeed._calls import PipelineCalls, SmallCalls
from partita.compat.deepspeed._optimizer import DeepSpeedOptimizer
from partita.compat.deepspeed._surface import QUESTIONS
from partita.compat.deepspeed.runtime.zero.partitioned import ParameterOffload, mark
from partita.engine import EngineBase
from partita.engine.as_module import AsModule
from partita.pipeline import PipelineModule

if TYPE_CHECKING:
    from partita.config import Config

OWN = ("config", "optimizer", "lr_scheduler", "training_dataloader")  # attributes that the engine beneath has too

logger = logging.getLogger("partita")


class DeepSpeedEngine(SmallCalls, AsModule, ConfigAnswers):
    """An engine of Partita under DeepSpeed's calls. What is not here is the engine's, and then the model's.

    Args:
        positional, named: as for DeepSpeed's `initialize()`: args, model, optimizer, model_parameters, training_data
            (or train_data), lr_scheduler, mpu, dist_init_required, collate_fn, config (or config_params, config_dict,
            config_dict_or_path). The first one may be the model.

    Attributes:
        module: the model.
        config: the config as the program wrote it, a dict.
        optimizer, lr_scheduler, training_dataloader: None where there is none.

    Raises:
        ConfigError, ValueError, TypeError: as `partita.initialize()`.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        order = named.pop("_order", OF_ENGINE)
        arguments, written = for_partita(order, positional, named)
        engine, sharded, loader, scheduler = partita.initialize(**arguments)
        super().__init__(engine.module)
        vars(self)["_engine"] = engine  # no child of this module
        self.config = written
        self.optimizer = None if sharded is None else DeepSpeedOptimizer(engine, sharded)
        if self.zero_optimization_partition_weights():
            mark(engine.module)
            if self.optimizer is not None:
                self.optimizer.parameter_offload = ParameterOffload(engine.module)
        self.training_dataloader = loader
        self.lr_scheduler = scheduler
        self._is_boundary: bool | None = None  # as the program has said
        self._is_ended = False  # the micro-batch of the last backward, for which step() has nothing to do
        self._is_deferred = False  # in no_sync()
        self._compiled = False
        if self.optimizer is not None:
            self.optimizer.steps_by(self.step)

    @classmethod
    def initialize(cls, *positional: Any, **named: Any) -> tuple[DeepSpeedEngine, Optimizer | None, Any, Any]:
        """The same as `initialize()`."""
        return initialize(*positional, **named)

    # -- whatever is not said here

    def __getattr__(self, name: str) -> Any:
        engine = vars(self).get("_engine")
        if engine is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"an engine has no attribute '{name}'")
        if name in QUESTIONS:
            return partial(QUESTIONS[name], engine.config)
        try:
            return getattr(engine, name)
        except AttributeError as error:
            raise absent_attribute(name, self._kinds, error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("optimizer", "lr_scheduler") and name in vars(self):
            raise AttributeError(f"engine.{name} is what trains the model, and stays: give another one to initialize()")
        engine = vars(self).get("_engine")
        is_own = engine is None or name in OWN or name.startswith("_") or hasattr(type(self), name)
        if not is_own and (hasattr(type(engine), name) or name in vars(engine)):
            setattr(engine, name, value)
        else:
            super().__setattr__(name, value)

    _kinds: tuple[str, ...] = ("deepspeed.DeepSpeedEngine",)

    def _settings(self) -> Config:
        return self._inner.config

    @property
    def _inner(self) -> EngineBase:
        engine: EngineBase = vars(self)["_engine"]
        return engine

    # -- a micro-batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self._inner(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Adds the gradients of `loss` (a scalar) to this step's; returns what they are those of, detached.

        Args:
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: divide the loss by `gradient_accumulation_steps`, so that sums become means.
        """
        self._inner.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        self._is_ended = False
        if self._is_deferred or self._is_boundary is False:
            # The next backward adds to this one in fp32, whether step() comes in between or not.
            self._is_ended = not self._is_last()
            self._inner.step()
        return loss.detach() / self._inner.gradient_accumulation_steps() if scale_wrt_gas else loss.detach()

    def _is_last(self) -> bool:
        """Whether this micro-batch is the last one of its step, as the program says, or by count."""
        if self._is_boundary is not None:
            return self._is_boundary
        return bool((self.micro_steps + 1) % self._inner.gradient_accumulation_steps() == 0)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Ends a micro-batch; at the boundary, updates the parameters and the learning rate.

        Raises:
            ValueError: `lr_kwargs` are given, which no schedule here takes.
        """
        if lr_kwargs:
            raise ValueError(f"step(lr_kwargs={dict(lr_kwargs)!r}): the engine steps its schedule without arguments")
        if self._is_deferred:
            raise RuntimeError("engine.step() was called inside engine.no_sync(): call it after the block")
        if self._is_ended:
            return
        self._inner.step()
        if self.optimizer is not None:
            self.optimizer.overflow = self._inner.last_known_step_was_skipped

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Says whether the next backward is the last one of a step; `step()` need not be called after the others."""
        self._is_boundary = is_boundary
        self._inner.set_gradient_accumulation_boundary(False if self._is_deferred else is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block add to the step, and are none of its last one.

        Raises:
            RuntimeError: in stages 2 and 3, which have no room for gradients that are not reduced.
        """
        with self._inner.no_sync():  # says what is refused; backwards are not in this block, as each is ended by a step
            pass
        self._is_deferred = True
        self.set_gradient_accumulation_boundary(self._is_boundary)
        try:
            yield
        finally:
            self._is_deferred = False
            self.set_gradient_accumulation_boundary(self._is_boundary)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients since the last `step()`; those of finished micro-batches stay, as in ZeRO."""
        self.module.zero_grad(set_to_none)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's state dict, names with "module."."""
        state: dict[str, Any] = self._inner.state_dict(*args, **kwargs)
        return state

    def compile(  # type: ignore[override]
        self, backend: Any = None, compile_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """Compiles the model in place, with torch.

        Args:
            backend: of torch.compile; None: inductor.
            compile_kwargs: further arguments of torch.compile.
            others: schedule, compiled_autograd_enabled: None and False.

        Raises:
            RuntimeError: parameters are partitioned (stage 3).
            ValueError: an argument asks for what is not there.
        """
        for name, value in others.items():
            if value:
                raise ValueError(f"compile({name}={value!r}): the model is compiled by torch.compile; leave it out")
        if self.zero_optimization_partition_weights():
            raise RuntimeError(
                "compile(): a compiled model trains in stages 0 to 2: leave compile() out, or set stage 2"
            )
        self.module.compile(backend=backend or "inductor", **(compile_kwargs or {}))
        self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile()` was called."""
        return self._compiled

    # -- weights and checkpoints

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The model's state dict with memory of its own. In stage 3 a collective: all ranks call it."""
        return self._trained_only(self._inner.module_state_dict(), exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """On rank 0 the whole state dict on the CPU, on other ranks None. A collective."""
        if not self.zero_optimization_partition_weights():
            raise ValueError("this function requires ZeRO-3 mode")
        state = self._trained_only(self._inner.module_state_dict(rank=0), exclude_frozen_parameters)
        return {name: _on_cpu(value) for name, value in state.items()} if self._inner.global_rank == 0 else None

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The same."""
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

    def _trained_only(self, state: dict[str, Any], trained_only: bool) -> dict[str, Any]:
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad} if trained_only else set()
        return {name: value for name, value in state.items() if name not in frozen}

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Writes the model's state dict as a file of torch. A collective.

        Returns:
            False in stage 3 if the config does not have `stage3_gather_16bit_weights_on_model_save`: nothing is saved.
        """
        if self.zero_optimization_partition_weights() and not self.zero_gather_16bit_weights_on_model_save():
            logger.warning(f"{save_filename} is not saved: stage3_gather_16bit_weights_on_model_save is false")
            return False
        state = self._trained_only(self._inner.module_state_dict(rank=0), exclude_frozen_parameters)
        if self._inner.global_rank == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(save_dir) / save_filename)
        return True

    save_fp16_model = save_16bit_model

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | int | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves all that the run needs to go on as `save_dir/tag`. A collective.

        Args:
            exclude_frozen_parameters: has no effect: a checkpoint of Partita always has the whole model.
        """
        self._inner.save_checkpoint(folder_of(save_dir), tag, client_state or {}, save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Goes on from a checkpoint; returns its path and the program's `client_state`. A collective.

        Without `tag` and without a file `latest` in the folder there is nothing to go on from: (None, None), with a
        warning.

        Raises:
            ValueError: `custom_load_fn` is given, which there is no use for.
            CheckpointError: the checkpoint is not there, is damaged, or does not fit; on all ranks.
        """
        if custom_load_fn is not None:
            raise ValueError(
                "load_checkpoint(custom_load_fn=): change the weights after loading, in GatheredParameters"
            )
        if tag is None and not os.path.isfile(os.path.join(folder_of(load_dir), "latest")):
            logger.warning(f"there is no checkpoint in '{load_dir}': it has no file 'latest', and no tag was given")
            return None, None
        require_own_checkpoint(folder_of(load_dir), tag)
        path, client_state = self._inner.load_checkpoint(
            load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only
        )
        return str(path), client_state

    def destroy(self) -> None:
        """Lets go of the model."""
        self._inner.destroy()


class PipelineEngine(PipelineCalls, DeepSpeedEngine):
    """A pipeline in training; `train_batch()` and `eval_batch()` are those of `partita.PipelineEngine`."""

    _kinds = ("deepspeed.PipelineEngine", "deepspeed.DeepSpeedEngine")


def initialize(*positional: Any, **named: Any) -> tuple[DeepSpeedEngine, Optimizer | None, Any, Any]:
    """Makes a model ready to train. Arguments are DeepSpeed's, see `DeepSpeedEngine`.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler); the last three are None where there is none.
    """
    kind = PipelineEngine if isinstance(model_in(positional, named), PipelineModule) else DeepSpeedEngine
    engine = kind(*positional, _order=OF_INITIALIZE, **named)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
