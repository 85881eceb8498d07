"""What Lightning saves beside the engine's state, and where."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

KEY = "lightning"  # in the client_state
OF_TRAINING = ("optimizer_states", "lr_schedulers")  # what a file of weights alone has not
_OF_ENGINE = ("state_dict", "optimizer_states")
_HPARAMS = ("hyper_parameters", "datamodule_hyper_parameters")
_PLAIN = (str, int, float, bytes, torch.Tensor, type(None))


def split(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder of a checkpoint, and its tag.

    Raises:
        ValueError: the path is an address, not one of a file system.
    """
    name = os.fspath(path)
    if "://" in name:
        raise ValueError(f"{name}: all ranks write a checkpoint into a folder of a file system that they share")
    return Path(name).parent, Path(name).name


def client_state_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine saves for Lightning. Hyper-parameters that are objects are left out, with a warning."""
    kept = {key: value for key, value in checkpoint.items() if key not in _OF_ENGINE}
    for section in _HPARAMS:
        if section in kept:
            values = {name: value for name, value in kept[section].items() if _is_plain(value)}
            left_out = sorted(map(str, kept[section].keys() - values.keys()))
            if left_out:
                rank_zero_warn(
                    f"the checkpoint has no {', '.join(left_out)} of the {section}: only numbers, texts, tensors, and "
                    "lists and dicts of them are saved. save_hyperparameters(ignore=[...]) leaves the others out"
                )
            kept[section] = values
    return {KEY: kept}


def lightning_state_of(client_state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What was given to `client_state_of`.

    Raises:
        ValueError: a program without Lightning saved this checkpoint.
    """
    if KEY not in client_state:
        raise ValueError(
            f"{path} is no checkpoint of Lightning's Trainer: give the model its weights by partita.zero.load_weights()"
        )
    state: dict[str, Any] = client_state[KEY]
    return state


def remove(path: Path) -> None:
    """Removes a checkpoint, which is a file or a folder, or is not there."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    elif path.exists():
        hidden = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)
