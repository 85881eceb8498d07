"""JSON from files that may be damaged or hostile: one meaning or an error, in time and memory linear in its size."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from partita.checkpoint.errors import CheckpointError

MAX_DEPTH = 100
MAX_NUMBER_CHARACTERS = 64
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str) -> Any:
    """The value that is written in `data`.

    What other readers of JSON let pass is refused: text that is not UTF-8, half a surrogate pair, a key written twice,
    NaN and Infinity (also as 1e999), integers outside of 64 bits and -0, and more than MAX_DEPTH levels.

    Args:
        where: names the file in the error.

    Raises:
        CheckpointError: see above.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
        )
        if _is_deep(value):
            raise RecursionError
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON at byte {len(text[: error.pos].encode())}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}: {error.reason}") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: not Unicode: half of a surrogate pair (\\ud800 to \\udfff)") from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return value


def shown(value: Any) -> str:
    """A value of a damaged file for a message: one line of at most about 80 characters."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'dict'} of {len(value)}"
    text = ascii(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is written twice")
    return found


def _integer(text: str) -> int:
    # Python's own conversion takes quadratic time.
    if len(text) > MAX_NUMBER_CHARACTERS or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the number {text[:24]}{'...' if len(text) > 24 else ''} has more than 64 bits")
    if text == "-0":
        raise ValueError("-0 is written, which is no integer")
    return int(text)


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARACTERS or not math.isfinite(float(text)):
        raise ValueError(f"the number {text[:24]}{'...' if len(text) > 24 else ''} is no 64-bit number")
    return float(text)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _is_deep(value: Any) -> bool:
    """Whether there are more than MAX_DEPTH levels of lists and objects. No recursion: the limit is no one else's."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, list | dict)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return any(isinstance(item, list | dict) for item in level)
