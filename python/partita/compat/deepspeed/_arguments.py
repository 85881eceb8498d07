"""What programs give to `initialize()` and to `DeepSpeedEngine()`, under all names that these have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from partita.checkpoint import CheckpointError
from partita.compat.deepspeed._config import CONFIG_NAMES, one_config, translated
from partita.compat.deepspeed._data import in_its_order
from partita.config import ConfigError

ORDER = ("args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler")
OF_INITIALIZE = (*ORDER, "distributed_port", "mpu", "dist_init_required", "collate_fn", "config", "mesh_param")
OF_ENGINE = (*ORDER, "mpu", "dist_init_required", "collate_fn", "config")
OTHER_NAMES = {"train_data": "training_data", "mesh_device": "mesh_param"}
UNUSED = ("config_class", "dont_change_device")  # of DeepSpeed's engine, made by its initialize()


def model_in(positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The model of a call; None: it has none."""
    return named.get("model") or next((value for value in positional[:2] if isinstance(value, nn.Module)), None)


def for_partita(
    order: tuple[str, ...], positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments for `partita.initialize()` by name, and the config as the program wrote it.

    Args:
        order: the names of arguments that are given by their place.

    Raises:
        TypeError: an argument is given twice, or there is none of that name.
        ConfigError: there is no config, which `initialize()` needs, or there are two, and they differ.
    """
    needs_config = order is OF_INITIALIZE
    if positional and isinstance(positional[0], nn.Module):
        order = order[1:]  # without a command line's arguments
    if len(positional) > len(order):
        raise TypeError(f"at most {len(order)} arguments are given by their place; got {len(positional)}")
    given = dict(zip(order, positional, strict=False))
    for name, value in named.items():
        own = OTHER_NAMES.get(name, name)
        if given.get(own) is not None:
            raise TypeError(f"the argument {name} is given twice")
        given[own] = value
    for name in UNUSED:
        given.pop(name, None)
    written = one_config(given.get("args"), {name: given.pop(name, None) for name in CONFIG_NAMES})
    if written is None and needs_config:
        raise ConfigError(
            "there is no config: give config=, a dict or the path of a file, or start the program with "
            "--deepspeed_config FILE"
        )
    given["config"] = {} if written is None else translated(written)
    given["args"] = None  # the config is known
    if given.get("training_data") is not None:
        stages = getattr(given.get("model"), "num_stages", 1)
        given["training_data"] = in_its_order(given["training_data"], given.get("collate_fn"), given["config"], stages)
    return given, written or {}


def folder_of(path: str | os.PathLike[str]) -> str:
    """A folder's path as text.

    Raises:
        ValueError: it is empty.
    """
    if not os.fspath(path):
        raise ValueError(f"the folder of a checkpoint must have a name, got {path!r}")
    return os.fspath(path)


def require_own_checkpoint(folder: str, tag: str | int | None) -> None:
    """Raises CheckpointError if DeepSpeed itself has saved the checkpoint that is to be loaded.

    Args:
        tag: None: the file `latest` names it.
    """
    latest = Path(folder) / "latest"
    name = latest.read_text().strip() if tag is None and latest.is_file() else str(tag)
    place = Path(folder) / name
    if next(place.glob("*_model_states.pt"), None) is not None:
        raise CheckpointError(
            f"'{place}' was saved by DeepSpeed, and its optimizer states cannot be taken over; for its weights, run "
            f"`python zero_to_fp32.py . weights --safe_serialization` in '{folder}', and give them to the model by "
            "partita.zero.load_weights(model, 'weights') before initialize()"
        )
