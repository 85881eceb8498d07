"""A config as DeepSpeed reads it, in Partita's words.

Keys and their answers are `partita.config`'s. What stands here concerns programs that were written for DeepSpeed and
shall train as they did there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from partita.config import ConfigError, read_object

CONFIG_NAMES = ("config", "config_params", "config_dict", "config_dict_or_path")
DEFAULTS = {"gradient_clipping": 1.0, "steps_per_print": None}
"""DeepSpeed's defaults that are not Partita's, of keys that a program sees the effect of."""


def as_dict(source: Any) -> dict[str, Any]:
    """A config as it is written: a dict (the same object), or the content of a file or of a string.

    Raises:
        ConfigError: it is neither, or the file cannot be read.
    """
    if isinstance(source, dict):
        return source
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, (str, os.PathLike)):
        return dict(read_object(source))
    raise ConfigError(f"a config is a dict or the path of a JSON file; got a {type(source).__name__}")


def translated(source: Any) -> dict[str, Any]:
    """A config for Partita that means what DeepSpeed reads in this one. The caller owns it."""
    config = deepcopy(as_dict(source))
    for key in [key for key in config if "." in str(key)]:  # TRL writes such keys, which DeepSpeed does not read
        del config[key]
    for key, value in DEFAULTS.items():
        config.setdefault(key, value)
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and str(optimizer.get("type", "")).lower() == "adam":
        params = optimizer.setdefault("params", {})
        if isinstance(params, dict):
            params.setdefault("adam_w_mode", True)
    if isinstance(optimizer, dict):
        _decay_of_torch(optimizer)
    return config


def _decay_of_torch(optimizer: dict[str, Any]) -> None:
    """With `torch_adam` DeepSpeed makes torch's AdamW of the params, which decays weights where no decay is given."""
    params = optimizer.get("params")
    if str(optimizer.get("type", "")).lower() not in ("adam", "adamw") or not isinstance(params, dict):
        return
    if params.get("torch_adam") is True and params.get("adam_w_mode") is not False:
        params.setdefault("weight_decay", 0.01)


def one_config(args: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one config of a call, as it is written; None: there is none.

    Args:
        args: of a command line; its `deepspeed_config` names a config.
        given: by the name of the parameter; None is none.

    Raises:
        ConfigError: there are two, and they differ; names both.
    """
    sources = {name: value for name, value in given.items() if value is not None}
    for name in ("deepspeed_config", "deepspeed"):
        value = args.get(name) if isinstance(args, Mapping) else getattr(args, name, None)
        if value is not None and not isinstance(value, bool):
            sources[f"args.{name}"] = value
    first: tuple[str, dict[str, Any]] | None = None
    for name, source in sources.items():
        config = as_dict(source)
        if first is not None and first[1] != config:
            raise ConfigError(f"{first[0]} and {name} are two configs that differ: give one of them")
        first = first or (name, config)
    return None if first is None else first[1]
