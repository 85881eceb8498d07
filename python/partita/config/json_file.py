"""Reading one JSON object from a file, strictly: duplicate keys and NaN are errors, not surprises."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partita.config.errors import ConfigError


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys were written more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The top-level object of the file.

    Raises:
        ConfigError: the file is missing or unreadable, is not JSON, repeats a key, or holds something else at the top.
    """
    name = os.fspath(path)
    try:
        # utf-8-sig also reads files that start with a byte order mark, as some editors write them.
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such config file (looked in {os.getcwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r}: cannot be read as a config file: {error}") from None

    try:
        content = json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not usable as JSON: {error}") from None

    if not isinstance(content, _Object):
        raise ConfigError(f"{name}: the top level is a {type(content).__name__}; expected an object, {{...}}")
    repeated = list(_repeated_keys(content))
    if repeated:
        raise ConfigError(f"{name}: written more than once: {', '.join(repeated)}; keep one of each")
    return content


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _repeated_keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (path + key for key in value.repeated)
        for key, item in value.items():
            yield from _repeated_keys(item, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated_keys(item, f"{path}{index}.")
