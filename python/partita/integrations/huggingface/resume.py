"""What a folder of Trainer's has, and what of it goes back into an engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from partita import Engine
from partita.integrations.huggingface.states import FOLDER

ADAPTERS = "adapter_model.safetensors"
logger = logging.getLogger("partita")

_FOREIGN = ("optimizer.pt", "optimizer.bin")


def require_own_checkpoint(folder: str) -> None:
    """Raises ValueError unless a run of Partita's has saved there all that it needs to go on."""
    if (Path(folder) / FOLDER).is_dir():
        return
    if not Path(folder).is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder '{folder}'")
    if any((Path(folder) / name).exists() for name in _FOREIGN):
        raise ValueError(
            f"'{folder}' was saved by another Trainer: its optimizer's state is that of whole tensors. Start from its "
            "weights instead, by from_pretrained(), without resume_from_checkpoint"
        )
    raise ValueError(
        f"'{folder}' has no folder '{FOLDER}', so there is nothing to go on from; with save_only_model=True a "
        "checkpoint has weights only: start from them by from_pretrained()"
    )


def newest_complete(folder: str) -> str:
    """The newest checkpoint of a run that was saved to its end: a run may have been killed while it saved or removed
    one. All ranks see the same folder.

    Raises:
        ValueError: there is none.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal():
            found[int(number)] = path
    foreign = None
    for step in sorted(found, reverse=True):
        if _is_complete(found[step]):
            return str(found[step])
        if any((found[step] / name).exists() for name in _FOREIGN):
            foreign = foreign or found[step]
            continue
        logger.warning(
            "'%s' is not complete, as the run ended while it was saved or removed: the one before", found[step]
        )
    told = f"resume_from_checkpoint=True: '{folder}' has no complete checkpoint of Partita's"
    if foreign is not None:
        told += f"; '{foreign.name}' was saved by another Trainer: start from its weights, by from_pretrained()"
    raise ValueError(told)


def _is_complete(path: Path) -> bool:
    try:  # the last file that Trainer writes, and the last one of the engine's
        json.loads((path / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (path / FOLDER / "manifest.json").exists()


def schedule_state_in(folder: str) -> Any:
    """The state of the schedule that Trainer has saved.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = Path(folder) / SCHEDULER_NAME
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises what the bytes make it raise
        raise ValueError(
            f"resume_from_checkpoint: '{path}', the state of the learning rate's schedule, cannot be read "
            f"({type(error).__name__}): take an older checkpoint"
        ) from error


def load_weights_of(engine: Engine, folder: str) -> None:
    """The engine has the weights of a checkpoint, and goes on with its own states. A collective."""
    if (Path(folder) / FOLDER).is_dir():
        engine.load_checkpoint(folder, FOLDER, load_module_only=True)
    elif (adapters := Path(folder) / ADAPTERS).exists():
        engine.load_module_state_dict(_adapter_weights(engine.module, adapters), strict=False)
    else:
        engine.load_module_state_dict(folder, strict=False)


def _adapter_weights(model: Any, path: Path) -> dict[str, Tensor]:
    """A file of adapters by the names of the model's state dict, which have the adapter's name in them."""
    active = model.active_adapters  # of a PeftModel, or of a model that has adapters by itself
    names = _names_in_file(model, (active() if callable(active) else active)[0])
    weights = load_file(path)
    found = {full: weights.get(name, weights.get(f"base_model.model.{name}")) for name, full in names.items()}
    return {full: value for full, value in found.items() if value is not None}


def adapter_names(model: Any) -> set[str] | None:
    """The tensors that are saved of a model with adapters: what is trained, and all that PEFT writes of each adapter,
    frozen ones too; None: all, as there are no adapters, or of a kind whose files are not tensors of the model."""
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return None
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for adapter, config in adapters.items():
        if not config.is_prompt_learning:
            try:
                wanted.update(_names_in_file(model, adapter, with_embeddings=True).values())
            except TypeError:  # it computes with the tensors, as AdaLoRA does
                return None
    return wanted


def _names_in_file(model: Any, adapter: str, *, with_embeddings: bool = False) -> dict[str, str]:
    """The names that PEFT gives to the tensors of an adapter in its file, and those of the model's state dict."""
    from peft import get_peft_model_state_dict

    names = {name: name for name in model.state_dict(keep_vars=True)}
    of_file = get_peft_model_state_dict(model, names, adapter_name=adapter, save_embedding_layers=with_embeddings)
    return dict(of_file)
