"""`PartitaStrategy`: Lightning's Trainer over Partita's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader

import partita
from partita.integrations.lightning.checkpoints import (
    OF_TRAINING,
    client_state_of,
    lightning_state_of,
    remove,
    split,
)
from partita.integrations.lightning.precision import PartitaPrecision
from partita.integrations.lightning.settings import (
    ADVICE,
    ConfigSource,
    for_evaluation,
    for_training,
    precision_of,
    read_config,
    stage_of,
    with_precision,
)


class PartitaStrategy(DDPStrategy):
    """Trains a LightningModule with Partita: `Trainer(strategy=PartitaStrategy(config={...}))`.

    Ranks, launchers, samplers and collectives of the program are those of Lightning's `DDPStrategy`. Forward, backward,
    clipping, update and checkpoints are the engine's. Schedules of `configure_optimizers` are stepped by Lightning.

    Args:
        config: a dict or the path of a file, as for `partita.initialize`. Batch sizes, accumulation, clipping and
            precision may be left out or "auto": they come from the Trainer and its data.
        accelerator, parallel_devices, cluster_environment, precision_plugin, process_group_backend, timeout,
            start_method: as for `DDPStrategy`.

    Raises:
        ConfigError, ValueError: the config cannot be used, or says otherwise than the Trainer; names both.

    Attributes:
        engine: the `partita.Engine`, from the setup of a run on.
    """

    strategy_name = "partita"
    optimizers: list[Any]

    def __init__(
        self,
        config: ConfigSource = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        precision_plugin: PartitaPrecision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: str = "popen",
    ) -> None:
        self._settings = read_config(config)
        self._engine: partita.Engine | None = None
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    @property
    def engine(self) -> partita.Engine:
        """The engine of this run."""
        if self._engine is None:
            raise RuntimeError(
                "PartitaStrategy has no engine yet: Trainer.fit(), validate(), test() or predict() make it"
            )
        return self._engine

    # -- what Trainer(precision=) means

    @property
    def precision_plugin(self) -> PartitaPrecision:
        """Of the config, if the Trainer says nothing."""
        return self._precision_plugin or PartitaPrecision(precision_of(self._settings))

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        """The one that the Trainer makes of its arguments; None: the config's."""
        if plugin is None:
            self._precision_plugin = None
            return
        self._settings = with_precision(self._settings, PartitaPrecision.like(plugin).precision)
        self._precision_plugin = PartitaPrecision(precision_of(self._settings))

    # -- building

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """In stage 3 what `configure_model` builds is partitioned while it is built."""
        config, dtype = for_evaluation(self._settings), torch.get_default_dtype()
        with partita.zero.Init(config=config, dtype=dtype, enabled=stage_of(self._settings) == 3):
            yield

    def model_to_device(self) -> None:
        """Moves what is not there; what was built partitioned is."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        if any(tensor.device != self.root_device for tensor in tensors):
            self.model.to(self.root_device)

    def setup(self, trainer: Any) -> None:
        """Makes the engine, with the optimizer of `configure_optimizers` or else the config's."""
        self.accelerator.setup(trainer)
        is_fit = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module
        if self._engine is not None and not is_fit and self._engine.module is module:
            self.model = self._engine  # in stage 3 the weights are in the engine of the last run
            return
        self.release()
        if is_fit and self._layer_sync:
            module = self._layer_sync.apply(module)
        self.model = module
        self.model_to_device()
        self._engine = self._training_engine(trainer, module) if is_fit else self._evaluation_engine(module)
        self.model = self._engine
        self.setup_precision_plugin()

    def _training_engine(self, trainer: Any, module: nn.Module) -> partita.Engine:
        _refuse_value_clipping(trainer)
        config = for_training(
            self._settings,
            micro_batch=_batch_size(trainer),
            accumulation=trainer.accumulate_grad_batches,
            clipping=trainer.gradient_clip_val,
        )
        self.setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            raise ValueError(
                f"configure_optimizers() returned {len(self.optimizers)} optimizers, and an engine has one: give one "
                "optimizer, with param groups where learning rates differ"
            )
        optimizer = None if isinstance(self.optimizers[0], _MockOptimizer) else self.optimizers[0]
        if optimizer is None and not config.get("optimizer"):
            raise ValueError(
                'configure_optimizers() returned None, and the config has no "optimizer": give one of them'
            )
        if optimizer is not None and config.get("optimizer"):
            raise ValueError(
                f"configure_optimizers() returned {type(optimizer).__name__}, and the config has an optimizer: {ADVICE}"
            )
        engine = partita.Engine(module, optimizer, config=config)
        engine.set_gradient_accumulation_boundary(True)
        self.precision_plugin.clips_at = engine.config.gradient_clipping
        # The program's own one: its schedules hold it, and callbacks look for it there.
        inner = getattr(engine.optimizer, "inner", None)
        self.optimizers = [inner]
        return engine

    def _evaluation_engine(self, module: nn.Module) -> partita.Engine:
        return partita.Engine(module, config=for_evaluation(self._settings))

    # -- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, in the engine's forward. One that runs backwards and steps itself is not within a forward.

        Raises:
            RuntimeError: there is no loss.
        """
        if not self.lightning_module.automatic_optimization:
            with self.precision_plugin.autocast(self.root_device.type):
                return self.lightning_module.training_step(*args, **kwargs)
        output = super().training_step(*args, **kwargs)
        if output is None:
            raise RuntimeError(
                "training_step() returned None: every micro-batch has a backward, on every rank; return a loss that is "
                "zero (loss * 0) to leave a batch out"
            )
        return output

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """A micro-batch that does not end a step."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
            self.engine.step()
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    # -- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: the engine loads."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: the engine has the optimizer's state."""
        return False

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: the engine saves it."""
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: the engine saves the weights, and `save_checkpoint` puts them into a file of weights alone."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder with all that the run needs to go on, written by all ranks; it appears when it is complete.

        A checkpoint of weights alone (`save_weights_only`) is a file as Lightning has it, which `load_from_checkpoint`
        and other strategies read: rank 0 gathers and writes it. When a `fit` in stages 0 to 2 is over there is no
        engine, and every checkpoint is such a file.

        Raises:
            ValueError: there are `storage_options`, or the path is not one of a file system.
            CheckpointError: the checkpoint was not written, or the state of a callback or a data module is no such that
                can be saved; names it.
        """
        path = self.broadcast(filepath)
        if self._engine is None and "optimizer_states" in checkpoint:
            split(path)
            rank_zero_warn(
                f"save_checkpoint({path}): fit() is over, and the engine and the optimizer's state with it, so this is "
                "a file of the weights alone. ModelCheckpoint(save_last=True) saves what a run goes on from"
            )
            checkpoint = {key: value for key, value in checkpoint.items() if key not in OF_TRAINING}
        if "optimizer_states" not in checkpoint:
            checkpoint["state_dict"] = (
                self.lightning_module.state_dict() if self._engine is None else self.engine.module_state_dict(rank=0)
            )
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise ValueError(
                "save_checkpoint(storage_options=): the engine writes into a folder, without a CheckpointIO"
            )
        folder, tag = split(path)
        self.engine.save_checkpoint(folder, tag, client_state=client_state_of(checkpoint), save_latest=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What Lightning saved; the engine has taken its own part.

        Raises:
            ValueError: a file of Lightning's own is to be trained on.
            CheckpointError: there is no such checkpoint, it is damaged, or it does not fit.
        """
        is_fit = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        folder, tag = split(checkpoint_path)
        if (folder / tag).is_file():
            if is_fit:
                raise ValueError(
                    f"{checkpoint_path} is a file of Lightning's: its optimizer state cannot be taken over. For its "
                    "weights alone: Model.load_from_checkpoint(path), and fit() without ckpt_path"
                )
            checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
            return checkpoint
        _, client_state = self.engine.load_checkpoint(
            folder, tag, load_module_strict=self.lightning_module.strict_loading, load_module_only=not is_fit
        )
        return lightning_state_of(client_state, folder / tag)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The weights of a file of Lightning's; those of a folder are there already."""
        if "state_dict" in checkpoint:
            self.engine.load_module_state_dict(dict(checkpoint["state_dict"]), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: the engine has loaded it."""

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a folder or a file; a folder has another name first, so that no half of one is left under its own."""
        if self.is_global_zero:
            remove(Path(filepath))

    # -- the end

    def teardown(self) -> None:
        """The end of a run. The module has its weights again, but for stage 3: see `release`."""
        if stage_of(self._settings) < 3:
            self.release()
            super().teardown()
        else:
            self.model = self.lightning_module
            for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
                part.teardown()

    def release(self) -> None:
        """Ends the engine, if there is one; its module has all weights again, on the device that it trains on.

        After a run in stage 3 the weights stay in the engine, for a `test()` say, as a rank may not have the memory for
        all of them. Who wants the module by itself calls this. A collective.
        """
        if self._engine is None:
            return
        engine, self._engine, self.model = self._engine, None, self.lightning_module
        weights = engine.module_state_dict() if stage_of(self._settings) == 3 else None
        engine.destroy()
        if weights is not None:
            buffers = [(module, dict(module._buffers)) for module in engine.module.modules()]
            engine.module.to_empty(device=self.root_device)
            for module, kept in buffers:
                module._buffers.update(kept)
            engine.module.load_state_dict(weights)


def _refuse_value_clipping(trainer: Any) -> None:
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ValueError('gradient_clip_algorithm="value": the engine clips the norm of all gradients together: "norm"')


def _batch_size(trainer: Any) -> int | None:
    """Samples in a batch of a DataLoader that `fit` was given; None: it is another kind of loader, or a hook makes it,
    which is not called twice."""
    loader = trainer.fit_loop._data_source.instance
    return loader.batch_size if isinstance(loader, DataLoader) else None
