"""How a folder becomes a checkpoint, so that at every moment each tag is a whole checkpoint, old or new, or is none.

[Note: the commit] Files are written and synced in a hidden folder. Then, in this order:

1. the hidden folder gets what a program has put beside the files of the old checkpoint. It is synced: all its names are
   on the disk. The new `latest` is written and synced under a hidden name. What needs room on the disk has it now;
2. the folder gets the name of the tag. If there is a checkpoint of this name, the two change names in one call; where
   there is no such call, the old one is set aside first, under a name by which `find()` knows it;
3. the directory is synced;
4. the new `latest` takes its name, and the directory is synced;
5. the old checkpoint is removed. What step 2 did is on the disk, so no crash can bring back a name for half a folder.

A save that dies leaves hidden names, which `sweep()` knows. An error before the end of step 2 leaves what was there; a
later one leaves the new checkpoint, under its tag.

Several programs may save into one directory at the same time, also under one tag: the one that comes to step 2 last
replaces what the other has saved. No `sweep()` touches what another save has under way, see [Note: claims].
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path

from partita.checkpoint.carry import carry_over
from partita.checkpoint.claim import new_claim, take_over
from partita.checkpoint.disk import (
    OWNER,
    Access,
    create_folder,
    exchange,
    is_at,
    kind_of,
    make_folders,
    remove,
    sync_folder,
    try_remove,
    write_durably,
)
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import aside_of, best_aside, opened_folder, read_checkpoint
from partita.checkpoint.manifest import MANIFEST
from partita.checkpoint.tags import LATEST, Leftover, aside_name, check_tag, parse_leftover, parse_lock, partial_name

__all__ = ["Staging", "sweep", "write_durably"]

# What renames answer when another program has given or taken a name meanwhile.
_CHANGED_MEANWHILE = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}
_TRIES = 20


class _Phase(Enum):
    PLANNED = "is not created yet"
    OPEN = "is being written"
    PUBLISHED = "is published"
    DISCARDED = "is discarded"


class Staging:
    """A folder that becomes a checkpoint, or nothing.

    Its files are written and synced by others, in `path`, between `create()` and `publish()`.
    """

    def __init__(self, directory: Path, tag: str, access: Access = OWNER) -> None:
        """Touches nothing yet.

        Args:
            access: who may read the folder, the directory if it is made, and `latest`.

        Raises:
            CheckpointError: no folder can have this tag.
        """
        self._tag = check_tag(tag)
        self._access = access
        self._directory = Path(os.path.abspath(directory))  # the program may change its working directory
        self._phase = _Phase.PLANNED
        self._token: str | None = None
        self._claim = ExitStack()

    @property
    def path(self) -> Path:
        """The folder, hidden until it is published. It has a name from `create()` on."""
        return self._directory / partial_name(self._tag, self._own_token())

    def create(self) -> None:
        """Makes the folder, and the directory with its parents.

        Raises:
            CheckpointError: something that is no checkpoint has the tag's name, or the name `latest`; nothing is made.
            OSError: what the system says.
        """
        self._require(_Phase.PLANNED, "create()")
        self._require_place()
        make_folders(self._directory, self._access.folder)
        claim = new_claim(self._directory)
        self._claim.callback(claim.release)
        self._token = claim.token
        create_folder(self.path, self._access.folder)
        self._phase = _Phase.OPEN

    def publish(self, is_latest: bool = True) -> Path:
        """Makes the folder the checkpoint of its tag, see [Note: the commit].

        Args:
            is_latest: `latest` names it then.

        Returns:
            The checkpoint's folder, DIRECTORY/TAG.

        Raises:
            CheckpointError: as in `create()`, or a file is missing that the manifest names, or has another size.
            OSError: what the system says. The tag is then the old checkpoint or the new one.
        """
        self._require(_Phase.OPEN, "publish()")
        if kind_of(self.path / MANIFEST) != "a file":
            raise RuntimeError(f"'{self.path}' has no {MANIFEST}, which is written last")
        self._require_whole()
        self._require_place()
        carry_over(self._directory, self._tag, self.path)
        sync_folder(self.path)
        latest = self._write_latest() if is_latest else None
        self._phase = _Phase.PUBLISHED  # from here on `path` may be the old checkpoint
        try:
            old = self._take_name()
        except OSError:
            self._phase = _Phase.OPEN
            if latest is not None:
                try_remove(latest)
            raise
        try:
            sync_folder(self._directory)
            if latest is not None:
                os.rename(latest, self._directory / LATEST)
                sync_folder(self._directory)
            if old is not None:
                with suppress(OSError):  # the checkpoint is there; the next sweep() warns about what is left
                    remove(old)
        finally:
            self._release()
        return self._directory / self._tag

    def discard(self) -> None:
        """Removes the folder if it is not published. Raises nothing: what cannot be removed is left to `sweep()`."""
        if self._phase is not _Phase.PUBLISHED:
            self._phase = _Phase.DISCARDED
            if self._token is not None:
                with suppress(OSError):
                    remove(self.path)
        self._release()

    def _release(self) -> None:
        with suppress(OSError):  # as with an old checkpoint
            self._claim.close()

    def _own_token(self) -> str:
        if self._token is None:
            raise RuntimeError(f"the folder of the checkpoint '{self._tag}' {_Phase.PLANNED.value}")
        return self._token

    def _require(self, phase: _Phase, call: str) -> None:
        if self._phase is not phase:
            raise RuntimeError(f"{call} when the checkpoint '{self._tag}' {self._phase.value}")

    def _require_whole(self) -> None:
        """No half of a checkpoint gets a name, whatever other programs have done to the folder."""
        try:
            read_checkpoint(self.path, self._tag)
        except CheckpointError as error:
            raise CheckpointError(f"'{self._tag}' is not whole, and so does not become a checkpoint: {error}") from None

    def _require_place(self) -> None:
        """Nothing is replaced but a checkpoint of ours. A folder of another kind may be anything, data for example."""
        place = self._directory / self._tag
        kind = kind_of(place)
        if kind not in (None, "a folder"):
            raise CheckpointError(f"'{place}' is {kind}, which no checkpoint replaces: remove it or give another tag")
        if kind == "a folder" and _is_of_others(place):
            raise CheckpointError(f"the folder '{place}' is no checkpoint: move it away or give another tag")
        latest = self._directory / LATEST
        if (kind := kind_of(latest)) not in (None, "a file"):
            raise CheckpointError(f"'{latest}' is {kind}, but is to be a file that names a checkpoint: remove it")

    def _take_name(self) -> Path | None:
        """Gives the folder the tag's name. Returns where the checkpoint is now that had this name."""
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._try_name()
            except OSError as error:
                if error.errno not in _CHANGED_MEANWHILE or not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _try_name(self) -> Path | None:
        place = self._directory / self._tag
        if kind_of(place) is None:
            os.rename(self.path, place)
            return None
        if exchange(self.path, place):
            return self.path
        old = self._directory / aside_name(self._tag, self._own_token())
        if kind_of(old) is not None:  # from the last try: meanwhile another save has taken the name
            sync_folder(self._directory)
            remove(old)
        os.rename(place, old)
        try:
            os.rename(self.path, place)
        except BaseException:
            with suppress(OSError):
                os.rename(old, place)
            raise
        return old

    def _write_latest(self) -> Path:
        """The coming `latest`, under a hidden name."""
        unfinished = self._directory / partial_name(LATEST, self._own_token())
        write_durably(unfinished, self._tag.encode(), self._access.file)
        return unfinished


def _is_of_others(folder: Path) -> bool:
    """Whether a folder has something in it, and no manifest.

    A folder whose name another save has given to its own meanwhile may be half removed when it is looked at.
    """
    for _ in range(_TRIES):
        try:
            with opened_folder(folder) as fd:
                names = os.listdir(fd)
                if not names or MANIFEST in names or is_at(fd, folder):
                    return bool(names) and MANIFEST not in names
        except CheckpointError:
            if kind_of(folder) is None:
                return False
    return False


def sweep(directory: Path) -> list[Path]:
    """Removes what saves that died have left, and returns what it has removed. What is under way stays.

    What cannot be removed stays, with a warning in the log. A checkpoint that was set aside, and whose successor did
    not get its name, gets its name back, unless another program has a newer checkpoint of this tag in hand.

    Raises:
        OSError: the directory cannot be read, or a checkpoint not be brought back.
    """
    with ExitStack() as claims:
        left = _abandoned(directory, claims)
        aside: dict[str, list[Path]] = {}
        for path, leftover in left.items():
            if leftover.set_aside and kind_of(path) == "a folder" and kind_of(directory / leftover.tag) is None:
                aside.setdefault(leftover.tag, []).append(path)
        for tag, paths in aside.items():
            if aside_of(directory, tag) - set(paths):  # one of them is under way, and about to get the name
                left = {path: leftover for path, leftover in left.items() if path not in paths}
                continue
            best = best_aside(paths, tag)
            try:
                os.rename(best, directory / tag)
            except OSError as error:
                if error.errno not in _CHANGED_MEANWHILE:
                    raise
            del left[best]
        if left or aside:
            sync_folder(directory)  # a leftover may be a checkpoint whose successor's name is not on the disk yet
        return [path for path in left if try_remove(path)]


def _abandoned(directory: Path, claims: ExitStack) -> dict[Path, Leftover]:
    """What is left of processes that have ended. It is claimed until `claims` is closed."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return {}
    found = {name: leftover for name in names if (leftover := parse_leftover(name)) is not None}
    tokens = {leftover.token for leftover in found.values()} | {parse_lock(name) for name in names}
    claimed = set()
    for token in sorted(token for token in tokens if token is not None):
        claim = take_over(directory, token)
        if claim is not None:
            claims.callback(claim.try_release)
            claimed.add(token)
    return {directory / name: leftover for name, leftover in found.items() if leftover.token in claimed}
