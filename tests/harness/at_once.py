"""A program that works in a folder of checkpoints, several of which run at the same time.

Arguments: the folder and what to do, `save NUMBER TAG ...` (so many saves, of the tags in turn) or `prune` (until there
is a file `done` beside the folder). `save` sweeps before every save, as engines do, and prunes nothing. It ends with an
error where a checkpoint of its own is not there afterwards.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

# The real modules, without what their packages import: a process without torch.
for _name in ("partita", "partita.checkpoint"):
    _spec = importlib.util.find_spec(_name)
    assert _spec is not None
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__path__ = list(_spec.submodule_search_locations or [])

from checkpoints import save, version_of  # noqa: E402
from partita.checkpoint.commit import sweep  # noqa: E402
from partita.checkpoint.errors import CheckpointError  # noqa: E402
from partita.checkpoint.folder import find, prune  # noqa: E402


def save_in_turn(directory: Path, number: int, tags: list[str]) -> None:
    for version in range(1, number + 1):
        tag = tags[version % len(tags)]
        sweep(directory)
        save(directory, tag, version)
        if not tag.startswith("shared"):
            require(directory, tag, version)


def require(directory: Path, tag: str, version: int) -> None:
    """Who prunes may have the checkpoint in hand for a moment, until it sees that this is not the one to remove."""
    for tries_left in reversed(range(200)):
        try:
            assert version_of(find(directory, tag)) == version
        except (CheckpointError, FileNotFoundError, NotADirectoryError):
            if not tries_left:
                raise
            time.sleep(0.01)
        else:
            return


def main() -> None:
    directory, what, *more = Path(sys.argv[1]), *sys.argv[2:]
    if what == "save":
        save_in_turn(directory, int(more[0]), more[1:])
        return
    while not (directory.parent / "done").exists():
        prune(directory, 1)


if __name__ == "__main__":
    main()
