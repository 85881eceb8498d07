"""The checkpoint from which a run goes on of itself; and, if one is damaged, the newest sound one before it.

Rank 0 looks and all ranks get one answer.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.claim import new_claim
from partita.checkpoint.disk import kind_of, make_folders
from partita.checkpoint.errors import CheckpointError, DamagedError
from partita.checkpoint.folder import Found, age, checkpoints, latest_tag, manifest_in, opened_folder, read_checkpoint
from partita.checkpoint.load import Wanted, load
from partita.checkpoint.manifest import MANIFEST
from partita.checkpoint.protection import PLAIN, Protection
from partita.checkpoint.tags import LATEST, check_tag, parse_leftover
from partita.checkpoint.verify import verify
from partita.comm import Communicator
from partita.model import TrainState

logger = logging.getLogger("partita")


def prepare(world: Communicator, directory: Path) -> None:
    """Makes the folder, and finds out now what would be wrong at the first save. A collective.

    Raises:
        CheckpointError: it cannot be made or written, or a rank does not see it; on all ranks.
    """
    what = f"no checkpoint can be saved in '{directory}'"

    def make() -> str:
        make_folders(directory)
        claim = new_claim(directory)
        exits.append(claim)
        return str(claim.path)

    exits: list[Any] = []
    try:
        mark = Path(from_rank_0(world, what, make))
        together(world, what, partial(_require_seen, mark))
    finally:
        for claim in exits:
            claim.try_release()


def newest(world: Communicator, directory: Path) -> str | None:
    """The tag of the checkpoint from which a run goes on of itself; None: there is none. A collective.

    It may be damaged. That is found when it is loaded.
    """
    what = f"the checkpoints in '{directory}' cannot be read"
    return json.loads(from_rank_0(world, what, lambda: json.dumps(newest_tag(directory))))  # type: ignore[no-any-return]


def newest_tag(directory: Path) -> str | None:
    """As `newest()`, for one process.

    `latest` names it: unlike the times of creation it does not depend on clocks. A save that died between giving a
    checkpoint its name and writing `latest` has left a hidden file with what `latest` was to be. Without `latest` the
    newest one by time counts.

    Raises:
        OSError: the folder cannot be read.
    """
    there = {found.tag: found for found in checkpoints(directory)}
    with suppress(CheckpointError):
        named = latest_tag(directory)
        if named in there or kind_of(directory / named) is not None:
            later = [found for found in _unnamed(directory, there) if _is_newer(found, there.get(named))]
            return max(later, key=age).tag if later else named
    return next(iter(there), None) or _broken(directory)


def load_sound(
    state: TrainState, directory: Path, tag: str | None, wanted: Wanted, protection: Protection = PLAIN
) -> tuple[Path, Any]:
    """As `load()`; if the checkpoint is damaged, takes the newest sound one before it, and says so. A collective.

    Raises:
        CheckpointError: as `load()` does, if the checkpoint is not there or does not fit; or none is sound.
    """
    world = state.world
    what = f"the checkpoint in '{directory}' was not loaded"
    tags = json.loads(from_rank_0(world, what, lambda: json.dumps(_from(directory, tag))))
    first: CheckpointError | None = None
    for one in tags:
        try:
            return load(state, directory, one, wanted, protection)
        except CheckpointError as error:
            damage = from_rank_0(world, what, partial(_damage, directory, one, protection))
            if not damage:
                raise  # it is sound, and of another model, say: older ones would not fit either
            first = first or error
            if world.rank == 0:
                logger.warning("%s; falling back to the newest sound checkpoint before it", damage)
    raise CheckpointError(f"{first}; no checkpoint before it is sound") from None


def verify_together(world: Communicator, folder: Path, protection: Protection = PLAIN) -> None:
    """Reads a checkpoint back from the disk and compares it with its digests; each rank takes some of its files.

    Raises:
        CheckpointError: says what is damaged; on all ranks.
    """

    def compare() -> None:
        found = read_checkpoint(folder, folder.name)
        manifest, cipher = found.manifest, protection.opened(found)
        names = sorted(manifest.files)[world.rank :: world.world_size]
        for name in names:
            _forget_cached(folder / name)
        mine = manifest.model_copy(update={"files": {name: manifest.files[name] for name in names}})
        for seen in verify(folder, mine, cipher):
            if seen.problem:
                raise CheckpointError(seen.problem)

    together(world, f"the checkpoint '{folder}' is damaged, as reading it back shows", compare)


def _require_seen(mark: Path) -> None:
    if kind_of(mark) is None:
        raise CheckpointError(
            f"'{mark}', which rank 0 has made, is not there: all ranks must see one folder, on a file system that all "
            "hosts share"
        )


def _forget_cached(path: Path) -> None:
    """What is read next comes from the disk, if the system can do that."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _unnamed(directory: Path, there: dict[str, Found]) -> list[Found]:
    """Whole checkpoints that `latest` was to name when a save died."""
    tags = []
    for name in os.listdir(directory):
        leftover = parse_leftover(name)
        if leftover is not None and leftover.tag == LATEST and not leftover.set_aside:
            with suppress(OSError, UnicodeDecodeError):
                tags.append((directory / name).read_text(encoding="utf-8"))
    return [there[tag] for tag in tags if tag in there]


def _is_newer(found: Found, than: Found | None) -> bool:
    return than is not None and age(found) > age(than)


def _broken(directory: Path) -> str | None:
    """Something that was a checkpoint, where there is no whole one: a run must not begin anew over it."""
    if not directory.is_dir():
        return None
    for name in sorted(os.listdir(directory)):
        with suppress(CheckpointError):
            if kind_of(directory / check_tag(name) / MANIFEST) is not None:
                return name
    return None


def _from(directory: Path, tag: str | None) -> list[str | None]:
    """The tag, and those of the whole checkpoints that are older, the newest first."""
    there = checkpoints(directory)
    first = tag
    if tag is None:
        with suppress(CheckpointError):
            first = latest_tag(directory)
    limit = None if first is None else _age_of(directory, first, there)
    older = [found.tag for found in there if found.tag != first and (limit is None or age(found) < limit)]
    return [tag, *older]


def _age_of(directory: Path, tag: str, there: list[Found]) -> tuple[str, str, int, str] | None:
    """None: nobody knows, as its manifest is damaged."""
    for found in there:
        if found.tag == tag:
            return age(found)
    path = directory / tag
    try:
        with opened_folder(path) as fd:
            return age(Found(path, tag, manifest_in(fd, path)))
    except CheckpointError:
        return None


def _damage(directory: Path, tag: str | None, protection: Protection) -> str:
    """What is damaged in a checkpoint, file and bytes; empty: nothing is, or there is no such checkpoint, or the key
    does not open it."""
    try:
        name = latest_tag(directory) if tag is None else tag
        path = next((found.path for found in checkpoints(directory) if found.tag == name), directory / name)
        if kind_of(path) is None:
            return ""
        found = read_checkpoint(path, name)
    except CheckpointError as error:
        return str(error)
    try:
        cipher = protection.opened(found)
    except DamagedError as error:
        return str(error)
    except CheckpointError:
        return ""  # an older one would not open either, or should not be taken for this one
    return next((seen.problem for seen in verify(path, found.manifest, cipher) if seen.problem), "")
