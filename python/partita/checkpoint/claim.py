"""Who is at work in a folder of checkpoints: what is alive is not swept away.

[Note: claims] Every save and every removal has a token, with which all its hidden names end. It holds a lock (flock)
on a file `.lock-TOKEN` from before the first of these names is made until the last one is gone. Who sweeps takes the
lock first. A token that nobody has locked, or whose file is not there, is of a process that has ended.

- The kernel drops the lock of a process that dies, also by SIGKILL. A process that is forked meanwhile, such as a
  worker that loads data, shares the lock: should its parent die, the lock stays until the worker has ended too. What is
  left is then removed by a later save, and nothing is lost by that.
- It is a lock on a file, not on a folder: NFS shares the locks of files between hosts, and not those of folders.
- Where the file system has no such locks, what is younger than `MIN_AGE_S` counts as alive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from partita.checkpoint.disk import OWNER, create_file, is_at
from partita.checkpoint.tags import lock_name, new_token

logger = logging.getLogger("partita")

# Seconds. No save takes so long, and no clock of another host is so wrong.
MIN_AGE_S = 6 * 3600


@dataclass(frozen=True)
class Claim:
    """The names that end with `token` are this process's, see [Note: claims].

    path: of the lock's file. fd: of the same file; None: there is no file, and nobody else can come to have the token.
    """

    token: str
    path: Path
    fd: int | None

    def release(self) -> None:
        """Ends the claim, once.

        Raises:
            OSError: the file is still there. Nobody holds it.
        """
        if self.fd is None:
            return
        try:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        finally:
            with suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_UN)  # closing does not unlock what a forked process shares
            os.close(self.fd)

    def try_release(self) -> None:
        """As `release()`, with a warning in the log instead of an error."""
        try:
            self.release()
        except OSError as error:
            logger.warning("'%s' is of no use, but cannot be removed: %s", self.path, error)


def new_claim(directory: Path) -> Claim:
    """A claim with a new token.

    Raises:
        OSError: what the system says.
    """
    while True:
        token = new_token()
        path = directory / lock_name(token)
        fd = create_file(path, OWNER.file)
        # Who sweeps may take the file for one without an owner until it is locked, and remove it.
        if _locks(fd, otherwise=lambda: True) and is_at(fd, path):
            return Claim(token, path, fd)
        os.close(fd)


def take_over(directory: Path, token: str) -> Claim | None:
    """The claim to what a process that has ended has left. None: the process is at work, or may be."""
    path = directory / lock_name(token)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return Claim(token, path, None)
    except OSError as error:
        logger.warning("what a save has left in '%s' cannot be removed: %s", directory, error)
        return None
    if _locks(fd, otherwise=lambda: time.time() - os.fstat(fd).st_mtime > MIN_AGE_S):
        return Claim(token, path, fd)
    os.close(fd)
    return None


def _locks(fd: int, otherwise: Callable[[], bool]) -> bool:
    """Locks a file. False: another process holds it. `otherwise` answers where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise()
    return True
