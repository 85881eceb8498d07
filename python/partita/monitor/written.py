"""Files with what was watched: tried at the start, written whole."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from partita.files import file_to_write

logger = logging.getLogger("partita")


def place_for(key: str, path: str) -> Path:
    """Where the file that a config's key names will be written; its folder is made.

    Raises:
        ValueError: it cannot be written; names the key.
    """
    try:
        place = file_to_write(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} = {path!r} cannot be written: {error}") from None
    return place


def write_whole(place: Path, text: str) -> bool:
    """The file has this text, or what it had before: then a warning says why, and training goes on. Returns whether it
    has the text."""
    beside = place.with_name(f".{place.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        logger.warning(f"'{place}' cannot be written; training goes on ({error})")
        return False
    return True
