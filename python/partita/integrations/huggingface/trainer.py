"""`Trainer` over an engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from partita import Engine
from partita.config import ConfigError
from partita.integrations.huggingface.accelerator import PartitaAccelerator
from partita.integrations.huggingface.commit import UNFINISHED, publish, rename_best, unfinished_in
from partita.integrations.huggingface.resume import (
    adapter_names,
    load_weights_of,
    newest_complete,
    require_own_checkpoint,
    schedule_state_in,
)
from partita.integrations.huggingface.sections import optimizer_of, require_sections, schedule_of
from partita.integrations.huggingface.settings import Asked, PartitaConfig, Said, read_config
from partita.integrations.huggingface.states import FOLDER, save
from partita.integrations.huggingface.weights import has_values, whole_state_dict


class PartitaMixin:
    """Makes a trainer of Hugging Face's train with Partita: `class MyTrainer(PartitaMixin, SFTTrainer)`.

    Args:
        partita_config: the config of the engine, a dict or the path of a file. What it leaves out, or says as "auto",
            the `TrainingArguments` say: batch size, accumulation, precision, `max_grad_norm`.

    Raises:
        ConfigError: config and `TrainingArguments` contradict each other; names both.
        ValueError: an argument asks for what Partita does not do here.
    """

    args: TrainingArguments
    accelerator: PartitaAccelerator
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: Any
    lr_scheduler: Any
    control: Any
    state: Any
    _is_of_config = False  # the optimizer
    _is_saving = False  # a checkpoint, in the folder of what is unfinished
    _saved_in: str | None = None  # the last checkpoint
    train_dataset: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(PartitaMixin) > order.index(Trainer):
            raise TypeError(
                f"class {cls.__name__}: PartitaMixin comes before the trainer: class {cls.__name__}(PartitaMixin, "
                "Trainer)"
            )

    def __init__(self, *args: Any, partita_config: PartitaConfig = None, **kwargs: Any) -> None:
        self._config = read_config(partita_config)
        # Trainer makes an optimizer and a schedule and steps them: in the place of those, what the config names.
        self._sections = {name: self._config.pop(name, None) for name in ("optimizer", "scheduler")}
        require_sections(self._sections)
        self._accelerator_arguments: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    # -- the accelerator

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._accelerator_arguments = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        return dict(self._accelerator_arguments)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, and then the accelerator is Partita's: both share Accelerate's state."""
        _refuse(self.args)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        accelerator = self.accelerator
        self.accelerator = PartitaAccelerator(
            **self._accelerator_arguments,
            partita_config=self._config,
            asked=_asked(self.args, accelerator.num_processes, accelerator.mixed_precision),
        )
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """What `zero.Init` has built is where it computes."""
        if any(p.device.type != device.type for p in model.parameters()):
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    @property
    def engine(self) -> Engine | None:
        """That of the model in training; None before `train()`."""
        wrapped = getattr(self, "model_wrapped", None)
        return wrapped if isinstance(wrapped, Engine) else None

    def call_model_init(self, trial: Any = None) -> Any:
        """As the trainer's. The engine of the model before ends."""
        if self.engine is not None:
            self.engine.destroy()
        return super().call_model_init(trial)  # type: ignore[misc]

    # -- optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As Trainer's; of the class and with the arguments that the config names, if it names one."""
        given, section = self.optimizer, self._sections["optimizer"]
        if given is not None and section is not None and not self._is_of_config:
            raise ConfigError(
                f"optimizer is in the config, and the program gives the trainer its own, {type(given).__name__}: leave "
                "one of them out"
            )
        made = super().create_optimizer(model)  # type: ignore[misc]
        if given is None and section is not None:
            made = self.optimizer = optimizer_of(section, made.param_groups, self.args)
            self._is_of_config = True
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's, or the one that the config names. Trainer steps it."""
        section = self._sections["scheduler"]
        if self.lr_scheduler is None and section is not None:
            over = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = schedule_of(section, over, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    # -- a step

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """The engine clips when `optimizer.step()` asks for the step: `max_grad_norm` is in its config."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """It is known after the step, and read when it is logged."""

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.engine is not None:
            grad_norm = self.engine.get_global_grad_norm()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)  # type: ignore[misc]

    # -- evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Before `train()` the model is evaluated as it is; one of `zero.Init` needs its engine."""
        prepared = self.accelerator.prepared_models
        if not prepared and self.engine is None and not has_values(self.model):
            if self.train_dataset is None:
                self.model_wrapped = self.accelerator.prepare_model(self.model)
            else:  # that of the training to come
                self.create_optimizer()
                self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        elif not prepared:  # Trainer evaluates `self.model`, with what an engine has attached to it
            prepared.append(self.model_wrapped)
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    # -- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's. `resume_from_checkpoint=True` takes the newest checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(folder) / UNFINISHED) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the trainer's, but the checkpoint's folder appears when all ranks have written what belongs in it. Only
        then older ones are removed: whenever the run ends, its last checkpoint is whole."""
        folder, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            unfinished_in(folder)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            place = publish(folder, name, self.state)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(place))
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(folder, limit, best_model_checkpoint=best, use_mtime=True)
        rename_best(self.state, folder)
        self._saved_in = str(Path(folder) / name)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # as soon as the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.engine is not None
        save(self.engine, output_dir, earlier=self._saved_in)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.engine is not None
        self.engine.load_checkpoint(checkpoint, FOLDER)
        self._saved_in = checkpoint
        self.lr_scheduler.load_state_dict(schedule_state_in(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The engine loads the weights with its states, once it is there."""
        require_own_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.engine is not None
        load_weights_of(self.engine, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model for `from_pretrained()`, adapters alone if it has some. A collective."""
        if self.engine is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        state = whole_state_dict(self.engine, adapter_names(self.model))
        folder = self.args.output_dir if output_dir is None else output_dir
        self._save(folder, state_dict=state)  # type: ignore[attr-defined]
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(  # type: ignore[attr-defined]
                commit_message="Model save", revision=self.args.hub_revision
            )


class PartitaTrainer(PartitaMixin, Trainer):
    """`transformers.Trainer` with `partita_config`; see `PartitaMixin`."""


def _asked(args: TrainingArguments, world_size: int, precision: str) -> Asked:
    def said(name: str) -> Said:
        return Said(f"{name} of TrainingArguments", getattr(args, name))

    return Asked(
        world_size,
        micro_batch=said("per_device_train_batch_size"),
        accumulation=said("gradient_accumulation_steps"),
        precision=Said("the precision (fp16, bf16) of TrainingArguments", precision),
        clipping=said("max_grad_norm"),
    )


def _refuse(args: TrainingArguments) -> None:
    """Raises ValueError if the arguments ask for another engine, or for what an engine cannot do."""
    if args.deepspeed or args.fsdp:
        name = "deepspeed" if args.deepspeed else "fsdp"
        raise ValueError(f"TrainingArguments({name}=...) and Partita exclude each other: give partita_config instead")
    if args.torch_compile:
        raise ValueError(
            "TrainingArguments(torch_compile=True): compile the model yourself, by model.compile(), in stages 0 to 2"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "TrainingArguments(auto_find_batch_size=True): an engine is built for one batch size; set "
            "per_device_train_batch_size"
        )
    for name in ("fp16", "bf16"):
        if getattr(args, f"{name}_full_eval") and not getattr(args, name):
            raise ValueError(
                f"TrainingArguments({name}_full_eval=True) would convert the model, whose parameters are the engine's: "
                f"train in {name}, by {name}=True, or leave it out"
            )
    if args.optim in ("lomo", "adalomo") or "layerwise" in args.optim:
        raise ValueError(f"optim = {str(args.optim)!r} updates while it computes gradients; use adamw_torch, say")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs and one process: launch with torchrun, a process for each GPU")
