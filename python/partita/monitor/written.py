"""Files with what was watched: tried at the start, written whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from partita.files import file_to_write


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
    except OSError as error:
        raise ValueError(f"{key} = {path!r} cannot be written: {error}") from None
    return place


def write_text(place: Path, text: str) -> None:
    """The file has this text, or what it had before."""
    beside = place.with_name(f".{place.name}.new")
    beside.write_text(text)
    os.replace(beside, place)
