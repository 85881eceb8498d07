"""Reading one object from a file or a string, strictly: keys written twice and NaN are errors, not surprises.

JSON may have comments (`//`, `#`, `/* */`) and commas before a closing bracket, as in HJSON. A file whose name ends in
.yaml or .yml is YAML. DeepSpeed's launcher passes a config as base64 of its JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from partita.config.errors import ConfigError

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")


class _Object(dict[Any, Any]):
    """An object that remembers which of its keys were written more than once."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def read_object(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The object in the file, or in the base64 that `path` is if there is no such file.

    Raises:
        ConfigError: the file is missing or unreadable, is not JSON (YAML), repeats a key, or holds something else.
    """
    name = os.fspath(path)
    if isinstance(name, str) and not os.path.exists(name) and (text := _from_base64(name)) is not None:
        return _only_once(_from_json(text, "the config in base64"), "the config in base64")
    try:
        # utf-8-sig also reads files that start with a byte order mark, as some editors write them.
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such config file (looked in {os.getcwd()})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{name!r}: cannot be read as a config file: {reason}") from None
    read = _from_yaml if name.lower().endswith((".yaml", ".yml")) else _from_json
    return _only_once(read(text, name), name)


def _from_base64(text: str) -> str | None:
    """The text behind the base64 of an object; None: it is none."""
    if not _BASE64.fullmatch(text):
        return None
    padded = text.rstrip("=")
    try:
        decoded = base64.urlsafe_b64decode((padded + "=" * (-len(padded) % 4)).replace("+", "-").replace("/", "_"))
        found = decoded.decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return found if found.lstrip().startswith("{") else None


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(_without_comments(text), object_pairs_hook=_Object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not usable as JSON: {error}") from None


def _without_comments(text: str) -> str:
    """The same text with blanks for comments and for commas before a closing bracket: places stay as they are."""

    def blank(found: re.Match[str]) -> str:
        token = found.group()
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return _LAST_COMMA.sub(blank, _COMMENT.sub(blank, text))


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _from_yaml(text: str, name: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{name}: reading YAML needs PyYAML: pip install 'partita[yaml]'") from None

    def construct_object(loader: Any, node: Any) -> _Object:
        pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        if any(not isinstance(key, Hashable) for key, _ in pairs):
            raise ValueError("a key is a list or an object")
        return _Object(pairs)

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("tag:yaml.org,2002:map", construct_object)
    # As in YAML 1.2, 3e-4 is a number. Version 1.1 takes it for a text.
    exponent = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not usable as YAML: {error}") from None


def _only_once(content: Any, name: str) -> dict[Any, Any]:
    """The content, if it is an object that repeats no key."""
    if not isinstance(content, _Object):
        raise ConfigError(f"{name}: the top level is a {type(content).__name__}; expected an object, {{...}}")
    repeated = list(_repeated_keys(content))
    if repeated:
        raise ConfigError(f"{name}: written more than once: {', '.join(repeated)}; keep one of each")
    return content


def _repeated_keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (f"{path}{key}" for key in value.repeated)
        for key, item in value.items():
            yield from _repeated_keys(item, f"{path}{key}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated_keys(item, f"{path}{index}.")
