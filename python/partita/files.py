"""Files that are written: which names may be taken."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """Where a file of this name is written: a place that is free, or has a regular file, which is then replaced.

    Every file that Partita writes asks here first. A link stays, and the file that it leads to is written.

    Raises:
        OSError: something else is there: a folder, a device, a pipe. Renaming a file onto a device, say, would replace
            the device for the whole machine.
    """
    place = Path(path).resolve()
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return place
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        instead = f", such as '{place / 'model.safetensors'}'" if stat.S_ISDIR(mode) else ""
        raise OSError(f"'{path}' is {kind}, which is not replaced by a file: give the name of a file{instead}")
    return place
