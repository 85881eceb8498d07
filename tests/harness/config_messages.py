"""What a config that is refused is told."""

from __future__ import annotations

from typing import Any

import pytest
from partita.config import ConfigError, load_config


def message_for(source: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(source)
    return str(raised.value)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """'fp16.enabled', True -> {'fp16': {'enabled': True}}"""
    first, _, rest = dotted.partition(".")
    return {first: nested(rest, value) if rest else value}
