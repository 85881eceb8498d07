"""Accelerate's `Accelerator` over an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from partita import Engine
from partita.config import ConfigError
from partita.integrations.huggingface.optimizer import PartitaOptimizer
from partita.integrations.huggingface.pairs import engine_of, paired
from partita.integrations.huggingface.settings import (
    Asked,
    PartitaConfig,
    Said,
    accumulation_of,
    engine_config,
    precision_in,
    read_config,
)
from partita.integrations.huggingface.states import EngineStates
from partita.integrations.huggingface.weights import whole_state_dict


class PartitaAccelerator(Accelerator):
    """An `Accelerator` whose `prepare(model, optimizer, ...)` returns an engine and its optimizer.

    A model and its optimizer come in one call of `prepare`, in any order. A model without one is for evaluation.
    Gradient accumulation, `sync_gradients`, `no_sync`, schedules and data loaders are Accelerate's.

    Args:
        partita_config: the config of the engine, a dict or the path of a file. What it leaves out, or says as "auto",
            the other arguments say.
        asked: what the arguments of a program around say beside those of Accelerate.

    Raises:
        ConfigError: config and arguments contradict each other; names both.
        ValueError: an argument asks for what Partita does not do here.
    """

    def __init__(
        self, *args: Any, partita_config: PartitaConfig = None, asked: Asked | None = None, **kwargs: Any
    ) -> None:
        self._given = read_config(partita_config)
        _refuse(kwargs)
        chosen = kwargs.get("mixed_precision")
        kwargs["mixed_precision"] = precision_in(self._given) if chosen is None else chosen
        super().__init__(*args, **kwargs)
        self._refuse_state()
        self.scaler = None  # the engine has a loss scale of its own
        self._unsynced: list[nn.Module] = []  # models in a no_sync() block
        self._states = EngineStates(self)
        plugin, steps = kwargs.get("gradient_accumulation_plugin"), kwargs.get("gradient_accumulation_steps")
        if plugin is None and steps is None and asked is None:
            self.gradient_state.plugin_kwargs["num_steps"] = accumulation_of(self._given) or 1
        self._asked = asked or Asked(
            self.num_processes,
            accumulation=Said("gradient_accumulation_steps of Accelerator", self.gradient_accumulation_steps),
            precision=Said("mixed_precision of Accelerator", self.mixed_precision),
        )

    def _refuse_state(self) -> None:
        """What a launcher may have set in the environment."""
        if self.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(
                f"PartitaAccelerator cannot train under {self.distributed_type}: launch with torchrun, or with "
                "`accelerate launch` and a config without DeepSpeed, FSDP and Megatron-LM"
            )
        if self.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                "torch_compile, dynamo_backend and dynamo_plugin: compile the model before prepare(), by "
                "model.compile(), in stages 0 to 2"
            )

    # -- preparing

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As Accelerate's. A model with an optimizer becomes an engine, which is an `nn.Module` with the model as
        `.module`.

        Raises:
            ValueError: an optimizer without its model, or a second model that is to be trained.
        """
        made: dict[int, Any] = {}
        for model, optimizer in paired(args, self._engines):
            made[id(model)], made[id(optimizer)] = self._make(model, optimizer, args)
        return super().prepare(*[made.get(id(arg), arg) for arg in args], device_placement=device_placement)

    def _make(self, model: nn.Module, optimizer: Optimizer, args: tuple[Any, ...]) -> tuple[Engine, PartitaOptimizer]:
        engine = self._engine_of(model, optimizer, args)
        engine._is_accelerate_prepared = True  # Accelerate's own mark: it takes the engine as it is
        return engine, PartitaOptimizer(engine)

    def _engine_of(self, model: nn.Module, optimizer: Optimizer | None, args: tuple[Any, ...]) -> Engine:
        config = engine_config(self._given, self._asked_with(args))
        if optimizer is None:
            config.pop("optimizer", None)
        elif config.get("optimizer") is not None:
            raise ConfigError(
                f"optimizer is in the config, and {type(optimizer).__name__} comes to prepare(): leave it out of "
                "the config"
            )
        return engine_of(model, optimizer, config, self.device if self.device_placement else None)

    def _asked_with(self, args: tuple[Any, ...]) -> Asked:
        """With the batch size of the data loader that comes with the model."""
        loader = next((arg for arg in args if isinstance(arg, DataLoader)), None)
        size = None if loader is None else getattr(loader, "total_batch_size", None)
        if size is not None:
            size //= self.num_processes
        elif loader is not None and loader.batch_size is not None:
            size = loader.batch_size // (self.num_processes if self.split_batches else 1)
        if size is None or self._asked.micro_batch is not None:
            return self._asked
        said = Said("batch_size of the DataLoader", size)
        return Asked(self.num_processes, said, self._asked.accumulation, self._asked.precision, self._asked.clipping)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """A model without an optimizer: in stage 3 partitioned over the ranks, else as it is. Its own calls work."""
        if isinstance(model, Engine) or getattr(model, "_is_accelerate_prepared", False):
            return super().prepare_model(model, device_placement, evaluation_mode)
        if self.zero_stage == 3 and not any(engine.module is model for engine in self._engines):
            engine = self._engine_of(model, None, ())
            engine._is_accelerate_prepared = True
            self._models.append(engine)
            return engine
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """Only one that is prepared already: `prepare()` takes a model and its optimizer together."""
        if not isinstance(optimizer, PartitaOptimizer):
            raise ValueError("an optimizer comes to prepare() in one call with its model: prepare(model, optimizer)")
        return super().prepare_optimizer(optimizer, device_placement)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the config asks for."""
        return int((self._given.get("zero_optimization") or {}).get("stage", 0))

    @property
    def prepared_models(self) -> list[nn.Module]:
        """What `prepare()` has returned for models, since the last `free_memory()`."""
        models: list[nn.Module] = self._models
        return models

    @property
    def _engines(self) -> list[Engine]:
        return [model for model in self._models if isinstance(model, Engine)]

    @property
    def _trained(self) -> PartitaOptimizer | None:
        """The optimizer of the model in training; there is one at the most."""
        return next((o for o in self._optimizers if isinstance(o, PartitaOptimizer)), None)

    # -- a micro-batch

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Adds the gradients of the loss, divided by `gradient_accumulation_steps`, to those of the step.

        Raises:
            RuntimeError: no model with an optimizer was prepared.
        """
        optimizer = self._trained
        if optimizer is None:
            raise RuntimeError("backward(): there is no engine: prepare(model, optimizer) comes before")
        optimizer.require_asked()
        optimizer.settle()
        engine, syncs = optimizer.engine, self.sync_gradients and optimizer.engine not in self._unsynced
        engine.set_gradient_accumulation_boundary(syncs)
        engine.backward(loss / self.gradient_accumulation_steps, **kwargs)
        if not syncs:
            engine.step()  # ends the micro-batch: the gradients are kept
            engine.set_gradient_accumulation_boundary(True)

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Backwards in this block end no step; stages 0 and 1 leave the gradients on their rank until one does."""
        self._unsynced.append(model)
        try:
            yield
        finally:
            self._unsynced.remove(model)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Bounds the norm of all gradients of the step together, and takes the step: `optimizer.step()` does nothing
        then. Returns the norm before. In a micro-batch that ends no step, nothing happens, and the norm is that of the
        last step.

        Raises:
            ValueError: a norm other than the 2-norm, a part of the trained parameters, or a bound that contradicts the
                config's `gradient_clipping`.
        """
        if norm_type != 2:
            raise ValueError(f"clip_grad_norm_(norm_type={norm_type}): the engine knows the 2-norm")
        optimizer = self._trained
        if optimizer is None:
            raise RuntimeError("clip_grad_norm_(): there is no engine: prepare(model, optimizer) comes before")
        _require_all(parameters, optimizer)
        if not self.sync_gradients:
            return optimizer.norm()
        bound = optimizer.engine.config.gradient_clipping
        if max_norm == float("inf"):
            max_norm = bound
        elif bound and bound != max_norm:
            raise ValueError(
                f"clip_grad_norm_(max_norm={max_norm}), and gradient_clipping = {bound:g} in the config: make them "
                "equal, or leave gradient_clipping out"
            )
        return optimizer.clip(max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> NoReturn:
        """Refused: gradients lie in flat buffers, partitioned over the ranks."""
        raise NotImplementedError(
            "clip_grad_value_(): the gradients are in buffers of the engine: use clip_grad_norm_(), or change them by "
            "partita.utils.safe_set_full_grad()"
        )

    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> NoReturn:
        """Refused: all ranks take the same steps."""
        raise NotImplementedError(
            "join_uneven_inputs(): all ranks take the same number of steps: leave even_batches at True, or drop_last"
        )

    # -- models and states

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True) -> Any:
        """The model that was prepared."""
        while isinstance(model, Engine):
            model = model.module
        return super().unwrap_model(model, keep_fp32_wrapper, keep_torch_compile)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The whole state dict on the main process, on its CPU, and an empty one elsewhere. A collective."""
        if not isinstance(model, Engine):
            return dict(super().get_state_dict(model, unwrap))
        return {} if self._states.is_saving else whole_state_dict(model)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        """As Accelerate's; what an engine trains is a checkpoint of Partita's in that folder."""
        with self._states.saving():
            return super().save_state(output_dir, safe_serialization, **kwargs)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Goes on from what `save_state()` has written, bit for bit."""
        with self._states.loading():
            super().load_state(input_dir, load_kwargs, **kwargs)

    def free_memory(self, *objects: Any) -> Any:
        """As Accelerate's. Engines that are given are destroyed; others go with their last reference."""
        for engine in (thing for thing in objects if isinstance(thing, Engine)):
            engine.destroy()
        return super().free_memory(*objects)


def _require_all(parameters: Any, optimizer: PartitaOptimizer) -> None:
    """Raises ValueError if some of the trained parameters are to be clipped without the others."""
    given = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    clipped = sum(each in given for each in trained)
    if 0 < clipped < len(trained):
        raise ValueError(
            f"clip_grad_norm_(): {clipped} of {len(trained)} trained parameters are given, and the engine bounds the "
            "norm of all gradients together: give model.parameters()"
        )


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in ("deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin", "megatron_lm_plugin", "parallelism_config"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} and Partita exclude each other: partita_config says what Partita does")
    if kwargs.get("mixed_precision") == "fp8":
        raise ValueError("mixed_precision = 'fp8': Partita trains in fp32, fp16 and bf16")
