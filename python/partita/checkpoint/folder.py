"""A folder of checkpoints: which there are, the one that is asked for, its files, and removing old ones.

A checkpoint is a folder with a manifest and all files that the manifest names, in their sizes. Anything else is none.
Links are not followed, since they may lead out of the folder. Reading changes nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.claim import new_claim
from partita.checkpoint.disk import dead_link, kind_of, sync_folder, try_remove
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, no_manifest, parse_manifest, plain_name
from partita.checkpoint.tags import LATEST, aside_name, check_tag, parse_leftover, partial_name

logger = logging.getLogger("partita")

_TAGS_NAMED = 5  # in an error
_TRIES = 20


@dataclass(frozen=True)
class Found:
    """A checkpoint. path: of its folder. tag: the folder's name, or the name that it had until it was set aside."""

    path: Path
    tag: str
    manifest: Manifest


def find(directory: Path, tag: str | None) -> Found:
    """The checkpoint of a tag; of the tag that `latest` names if `tag` is None.

    A save that ended while it replaced a checkpoint of its own tag may have left that one under a hidden name, where it
    is found.

    Raises:
        CheckpointError: there is none, or it is not whole. Says which there are, and what to do.
    """
    require_folder(directory)
    try:
        if tag is not None:
            return _read_at_its_place(directory, check_tag(tag))
        latest = latest_tag(directory)
        try:
            return _read_at_its_place(directory, latest)
        except CheckpointError:
            if kind_of(place_of(directory, latest)) is not None:
                raise
            raise CheckpointError(f"'{directory / LATEST}' names '{latest}', which is not there") from None
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{error}; {_what_there_is(directory)}") from None


def checkpoints(directory: Path) -> list[Found]:
    """All checkpoints, the newest first: by the time of creation, then by step. Empty: none, or no such folder.

    A run that goes back to an older checkpoint and trains on saves new checkpoints of lower steps than old ones have.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for tag, path in _places(directory).items():
        with suppress(CheckpointError):
            found.append(read_checkpoint(path, tag))
    return sorted(found, key=age, reverse=True)


def age(found: Found) -> tuple[str, str, int, str]:
    """Newer checkpoints have larger values."""
    seconds, _, fraction = found.manifest.created.removesuffix("Z").removesuffix("+00:00").partition(".")
    return seconds, fraction.ljust(6, "0"), found.manifest.step, found.tag


def latest_tag(directory: Path) -> str:
    """The tag that the file `latest` holds.

    Raises:
        CheckpointError: there is no such file, or it holds no tag.
    """
    path = directory / LATEST
    with opened_folder(directory, follow=True) as fd:
        try:
            text = _read(fd, path, limit=4096).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"'{path}' does not hold a text") from None
    with suppress(CheckpointError):
        return check_tag(text.strip())
    raise CheckpointError(f"'{path}' holds {text[:60]!a}, which is not a tag")


def read_checkpoint(path: Path, tag: str) -> Found:
    """The checkpoint in a folder. The manifest is read; files are looked at for their sizes, and not read.

    Raises:
        CheckpointError: names what is missing or wrong.
    """
    with opened_folder(path) as fd:
        manifest = manifest_in(fd, path)
        for name, record in manifest.files.items():
            size = _size(fd, path / name)
            if size != record.size:
                raise CheckpointError(f"'{path / name}' has {size} bytes, but its manifest says {record.size}")
    return Found(path=path, tag=tag, manifest=manifest)


def open_file(folder: Path, name: str) -> int:
    """A file of a checkpoint, opened for reading. The caller closes the file descriptor.

    Raises:
        CheckpointError: the name is not a plain one, there is no such file, or it is a link, a folder, a pipe, ...
    """
    with opened_folder(folder) as fd:
        return open_in(fd, folder / _plain(folder, name))


def prune(directory: Path, keep_last: int, among: Callable[[Found], bool] | None = None) -> list[Found]:
    """Removes all checkpoints but the newest ones and the one that `latest` names; returns what it has removed.

    The newest are those that were created last.
    What is no checkpoint stays, and what cannot be removed, with a warning in the log.

    Args:
        keep_last: how many of the newest stay, at least 1.
        among: the others stay, and are not counted. None: all are counted.

    Raises:
        ValueError: keep_last is less than 1.
        OSError: the folder cannot be read.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least one checkpoint is kept")
    latest = None
    with suppress(CheckpointError):
        latest = latest_tag(directory)
    counted = [found for found in checkpoints(directory) if among is None or among(found)]
    old = [found for found in counted[keep_last:] if found.tag != latest]
    if not old:
        return []
    try:
        claim = new_claim(directory)
    except OSError as error:
        logger.warning("the old checkpoints in '%s' cannot be removed: %s", directory, error)
        return []
    try:
        return [found for found in old if _retire(found, claim.token)]
    finally:
        claim.try_release()


def _retire(found: Found, token: str) -> bool:
    """Removes a checkpoint, which is none from a moment on: half of it must not look like one.

    Another program may have replaced the checkpoint since it was found. The new one gets its name back; until then it
    has a name under which it is found.
    """
    aside = found.path.with_name(aside_name(found.tag, token))
    hidden = found.path.with_name(partial_name(found.tag, token))
    try:
        os.rename(found.path, aside)
        try:
            if not _is_still(found, aside):
                raise FileNotFoundError(errno.ENOENT, "another checkpoint has its name", str(found.path))
            os.rename(aside, hidden)
        except BaseException:
            with suppress(OSError):  # there may be one more of this name, a newer one
                os.rename(aside, found.path)
            raise
        sync_folder(hidden.parent)
    except FileNotFoundError:
        return False  # another program was faster
    except OSError as error:
        logger.warning("the old checkpoint '%s' cannot be removed: %s", found.path, error)
        return False
    return try_remove(hidden)


def _is_still(found: Found, path: Path) -> bool:
    try:
        return read_checkpoint(path, found.tag).manifest == found.manifest
    except CheckpointError:
        return False


# -- places


def _places(directory: Path) -> dict[str, Path]:
    """Where the folder of each tag is: under its name, or else where it was set aside."""
    places: dict[str, Path] = {}
    aside: dict[str, list[Path]] = {}
    for path in _folders(directory):
        leftover = parse_leftover(path.name)
        if leftover is not None and leftover.set_aside:
            aside.setdefault(leftover.tag, []).append(path)
        elif leftover is None:
            with suppress(CheckpointError):
                places[check_tag(path.name)] = path
    for tag, paths in aside.items():
        if tag not in places and kind_of(directory / tag) is None:
            places[tag] = best_aside(paths, tag)
    return places


def place_of(directory: Path, tag: str) -> Path:
    """Where the folder of one tag is, or would be: under its name, or else where it was set aside."""
    path = directory / tag
    return path if kind_of(path) is not None else _places(directory).get(tag, path)


def _read_at_its_place(directory: Path, tag: str) -> Found:
    """As `read_checkpoint()`; looks again where another program has replaced what did not seem whole."""
    path = place_of(directory, tag)
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            return read_checkpoint(path, tag)
        except CheckpointError:
            path = place_of(directory, tag)
            if _identity(path) == before:
                raise
    return read_checkpoint(path, tag)


def _identity(path: Path) -> tuple[Path, int, int] | None:
    """Differs where another folder has the name, or the folder another name."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return path, status.st_dev, status.st_ino


def aside_of(directory: Path, tag: str) -> set[Path]:
    """All folders that were set aside for one tag, by programs that are at work or have ended."""
    found = {path: parse_leftover(path.name) for path in _folders(directory)}
    return {path for path, it in found.items() if it is not None and it.set_aside and it.tag == tag}


def best_aside(paths: list[Path], tag: str) -> Path:
    """The newest checkpoint of those that were set aside for one tag; any folder if none is whole."""
    whole = []
    for path in paths:
        with suppress(CheckpointError):
            whole.append(read_checkpoint(path, tag))
    return max(whole, key=age).path if whole else paths[0]


def _folders(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(directory / entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def require_folder(directory: Path) -> None:
    """Raises CheckpointError for what is no folder of checkpoints. Its name, which is the caller's, may be a link."""
    try:
        link = dead_link(directory)
        if link is not None:
            wrong = f"'{link}' is a link to nothing"
        elif kind_of(directory / MANIFEST) == "a file":
            raise CheckpointError(f"'{directory}' is a checkpoint: give the folder that it is in, and its name as tag")
        elif directory.is_dir():
            return
        else:
            kind = kind_of(directory.resolve())
            wrong = f"'{directory}' is {kind}, not a folder" if kind else f"'{directory}' is not there"
    except OSError as error:
        raise CheckpointError(f"'{directory}' cannot be read: {error.strerror}") from None
    raise CheckpointError(f"{wrong}: give the folder in which checkpoints were saved")


def _what_there_is(directory: Path) -> str:
    try:
        tags = [found.tag for found in checkpoints(directory)]
    except OSError as error:
        return f"the folder cannot be read: {error.strerror}"
    if not tags:
        return f"'{directory}' has no whole checkpoint: give the folder in which checkpoints were saved"
    more = f" and {len(tags) - _TAGS_NAMED} older ones" if len(tags) > _TAGS_NAMED else ""
    return f"whole checkpoints are, newest first, {', '.join(map(repr, tags[:_TAGS_NAMED]))}{more}: give one as tag"


# -- files


@contextmanager
def opened_folder(folder: Path, *, follow: bool = False) -> Iterator[int]:
    """A file descriptor of a folder, which stays this folder even if another one gets its name.

    Args:
        follow: its name may be a link.

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        raise CheckpointError(_refusal(folder, error)) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _plain(folder: Path, name: str) -> str:
    try:
        return plain_name(name)
    except ValueError as error:
        raise CheckpointError(f"'{folder}': {error}") from None


def manifest_in(folder_fd: int, path: Path) -> Manifest:
    """The manifest in an opened folder, whatever else is there. path: of the folder, for errors.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not _has(folder_fd, MANIFEST):
        raise CheckpointError(f"'{path}' {no_manifest(os.listdir(folder_fd))}")
    return parse_manifest(_read(folder_fd, path / MANIFEST, MAX_MANIFEST_BYTES), f"'{path / MANIFEST}'")


def _has(folder_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        pass  # who opens it learns more
    return True


def _size(folder_fd: int, path: Path) -> int:
    try:
        status = os.stat(path.name, dir_fd=folder_fd, follow_symlinks=False)
    except OSError as error:
        raise CheckpointError(_refusal(path, error)) from None
    _require_regular(status.st_mode, path)
    return status.st_size


def open_in(folder_fd: int, path: Path) -> int:
    """A file of an opened folder, opened for reading. path: of the file, for errors.

    Raises:
        CheckpointError: there is no such file, or it is a link, a folder, a pipe, ...
    """
    # Not blocking: a pipe would wait for a writer. Regular files know no difference.
    try:
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
    except OSError as error:
        raise CheckpointError(_refusal(path, error)) from None
    try:
        _require_regular(os.fstat(fd).st_mode, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(folder_fd: int, path: Path, limit: int) -> bytes:
    """All bytes of a file, which may have `limit` at most."""
    with os.fdopen(open_in(folder_fd, path), "rb") as file:
        try:
            data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as error:
            raise CheckpointError(_refusal(path, error)) from None
    if data is None or len(data) > limit:
        raise CheckpointError(f"'{path}' has more than the {limit} bytes that it may have")
    return data


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISLNK(mode):
        raise CheckpointError(f"'{path}' is a link, which is not followed")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"'{path}' is not a regular file")


def _refusal(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no '{path}'"
    if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
        return f"'{path}' is a link, which is not followed"
    if error.errno == errno.ENOTDIR:
        return f"'{path}' is not a folder"
    return f"'{path}' cannot be read: {error.strerror}"
