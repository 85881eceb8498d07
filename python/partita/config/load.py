"""From a dict, a file or nothing to a `Config`.

[Note: pydantic when a config is needed] Importing pydantic takes longer than importing the rest of the package. So the
models, and what imports the models, are imported inside the functions that need a `Config`. Other modules name `Config`
in annotations only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from partita.config.errors import ConfigError
from partita.config.json_file import read_json_object

if TYPE_CHECKING:
    from partita.config.models import Config

ConfigSource: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | Config | None"
"""What a config is made from."""


def load_config(source: ConfigSource = None) -> Config:
    """Read and check a configuration.

    Args:
        source: a dict, the path of a JSON file, a `Config` (returned as it is), or None for all defaults.

    Raises:
        ConfigError: lists every wrong key with its value and what is allowed instead.
    """
    from partita.config.models import Config
    from partita.config.validate import validated

    if isinstance(source, Config):
        return source
    if source is None:
        return Config()
    if isinstance(source, Mapping):
        return validated(dict(source), origin="the config")
    if isinstance(source, (str, os.PathLike)):
        return validated(read_json_object(source), origin=os.fspath(source))
    raise ConfigError(f"a config is a dict, the path of a JSON file, or a Config; got a {type(source).__name__}")
