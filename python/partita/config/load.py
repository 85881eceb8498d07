"""From a dict, a file, a string or nothing to a `Config`.

[Note: pydantic when a config is needed] Importing pydantic takes longer than importing the rest of the package. So the
models, and what imports the models, are imported inside the functions that need a `Config`. Other modules name `Config`
in annotations only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from partita.config.answers import Finding
from partita.config.errors import ConfigError
from partita.config.text_file import read_object

if TYPE_CHECKING:
    from partita.config.models import Config

FileOrDict: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str]"
ConfigSource: TypeAlias = "FileOrDict | Config | None"
"""What a config is made from."""


def load_config(source: ConfigSource = None) -> Config:
    """Read and check a configuration.

    Args:
        source: a dict, the path of a file (JSON, with comments if need be, or YAML), the JSON in base64, a `Config`
            (returned as it is), or None for all defaults.

    Raises:
        ConfigError: lists every wrong key with its value and what is allowed instead.
    """
    from partita.config.models import Config
    from partita.config.validate import validated

    if isinstance(source, Config):
        return source
    if source is None:
        return Config()
    return validated(*_read(source))


def answers_to(source: FileOrDict) -> list[Finding]:
    """The answer to every key that a config has, in its order.

    Raises:
        ConfigError: the source cannot be read.
    """
    from partita.config.validate import answers_in

    return answers_in(_read(source)[0])


def clean_form(source: FileOrDict) -> dict[str, Any]:
    """A config as a nested dict of Partita's own keys, without what has no effect. The caller owns the dict.

    Raises:
        ConfigError: lists every wrong key with its value and what is allowed instead.
    """
    from partita.config.validate import clean

    return clean(*_read(source))


def _read(source: Any) -> tuple[Mapping[Any, Any], str]:
    """The keys of a config as they are written, and what an error message calls them."""
    if isinstance(source, Mapping):
        return source, "the config"
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        return read_object(source), name if os.path.exists(name) else "the config in base64"
    raise ConfigError(
        f"a config is a dict, the path of a JSON or YAML file, or a Config; got a {type(source).__name__}"
    )
