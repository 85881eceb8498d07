"""Single effects on the file system, each with an error that names its path."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("partita")

# linux/fs.h and fcntl.h
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# Answers of kernels and file systems (NFS, some of FUSE) that cannot exchange names.
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
# Answers of file systems on which a folder needs no fsync, or cannot have one.
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.EOPNOTSUPP}

_TRIES = 100


@dataclass(frozen=True)
class Access:
    """Who may read: the modes of files and of folders, whatever the process's umask is."""

    file: int
    folder: int


OWNER, GROUP = Access(0o600, 0o700), Access(0o640, 0o750)

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFLNK: "a link"}


def kind_of(path: Path) -> str | None:
    """What is there: "a folder", "a file", "a link" or "a special file". None: nothing. A link is not followed.

    Raises:
        OSError: the system does not say.
    """
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "a special file")
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_at(fd: int, path: Path) -> bool:
    """Whether what is open as `fd` still has this name. A link is not followed.

    Raises:
        OSError: the system does not say.
    """
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def dead_link(path: Path) -> Path | None:
    """The path, or one of its parents, if that is a link to nothing or in a circle.

    Raises:
        OSError: the system does not say.
    """
    return next((place for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of calls on file descriptors, which know no name, get this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def create_file(path: Path, mode: int) -> int:
    """A new file of this mode, opened for reading and writing. The caller closes the file descriptor.

    Raises:
        FileExistsError: there is something of this name, also if it is a link to nowhere.
        OSError: anything else that the system says.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with suppress(OSError):  # a file system without modes
            os.fchmod(fd, mode)
    return fd


def create_folder(path: Path, mode: int) -> None:
    """A new folder of this mode.

    Raises:
        FileExistsError: there is something of this name.
        OSError: anything else that the system says.
    """
    path.mkdir(mode)
    found = stat.S_IMODE(path.stat().st_mode)
    if found & 0o777 != mode:
        with suppress(OSError):
            path.chmod(found & ~0o777 | mode)  # the bit stays by which files get the folder's group


def write_durably(path: Path, data: bytes, mode: int = OWNER.file) -> None:
    """Writes a new file, which is on the disk when this returns. A file that could not be written whole is removed.

    Raises:
        FileExistsError: there is something of this name, also if it is a link to nowhere.
        OSError: anything else that the system says.
    """
    fd = create_file(path, mode)
    try:
        with naming(path):
            try:
                left = memoryview(data)
                while left:  # a call may write less; Python repeats one that a signal interrupts
                    left = left[os.write(fd, left) :]
                os.fsync(fd)
            finally:
                os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns.

    Raises:
        OSError: what the system says.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(fd)


def make_folders(folder: Path, mode: int = OWNER.folder) -> None:
    """Makes a folder with its parents; each new name is on the disk when this returns.

    Args:
        mode: of the folder, if it is made now. Its parents have the modes that the process gives.

    Raises:
        OSError: what the system says, or NotADirectoryError: something else is there, or a link to nothing.
    """
    if (link := dead_link(folder)) is not None:
        raise NotADirectoryError(errno.ENOTDIR, "Not a folder, but a link to nothing", str(link))
    missing = [path for path in (folder, *folder.parents) if kind_of(path) is None]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            create_folder(path, mode) if path == folder else path.mkdir()
        sync_folder(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def exchange(first: Path, second: Path) -> bool:
    """Two things change their names, both at once. False: this system or file system cannot, and nothing has changed.

    Raises:
        OSError: anything else that the system says.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but never what a link leads to.

    Raises:
        OSError: what the system says. A part may be gone.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            shutil.rmtree(path) if kind_of(path) == "a folder" else path.unlink()
        except FileNotFoundError:  # somebody else removes it, or things in it
            if kind_of(path) is None:
                return
            if not tries_left:
                raise
        else:
            return


def try_remove(path: Path) -> bool:
    """Removes what is of no use, as `remove()` does. False, and a warning in the log: it is still there, or a part."""
    try:
        remove(path)
    except OSError as error:
        logger.warning("'%s' is of no use, but cannot be removed: %s", path, error)
        return False
    return True


def preallocate(path: Path, size: int, mode: int | None = None) -> None:
    """Makes a file of this size, whose bytes have their place on the disk.

    Args:
        mode: None: what the process gives to new files.

    Raises:
        FileExistsError: there is something of this name.
        OSError: there is no room, or what else the system says.
    """
    if mode is None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    else:
        fd = create_file(path, mode)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)} (there is no room for {size:,} bytes)"
        raise OSError(error.errno, why, str(path)) from None
    finally:
        os.close(fd)
