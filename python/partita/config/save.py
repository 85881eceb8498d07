"""The config as JSON."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from partita.files import file_to_write

if TYPE_CHECKING:
    from partita.config.models import Config


def default_config() -> dict[str, Any]:
    """Every key with its default, nested as in the JSON file. The caller owns the dict."""
    from partita.config.models import Config  # see [Note: pydantic when a config is needed]

    return Config().model_dump(mode="json")


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write every key, defaults included; `load_config(path)` gives an equal `Config`.

    Raises:
        OSError: the file cannot be written, or what has its name is no regular file.
    """
    text = json.dumps(config.model_dump(mode="json"), indent=2, allow_nan=False)
    file_to_write(path).write_text(text + "\n", encoding="utf-8")
