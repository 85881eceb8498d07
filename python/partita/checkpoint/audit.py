"""The audit log of a folder of encrypted checkpoints: who did what with them. Lines are only added.

[Note: the audit log] `audit.jsonl` has a line of JSON for each thing that was done. A line has a number, the hash of
the line before, and a hash of its own with a key that only those have who have the user's key. So nobody else can
change a line, take one out or put one in without its being seen. `audit.head` has the number and the hash of the last
line, by which lines are missed that were cut at the end. Each checkpoint has those of the line by which it was saved.

The log has a random key of its own, which stands in `audit.head`, wrapped with a key that is derived from the user's.
Another user key needs another `audit.head`, and the lines stay as they are.

Who can write into the folder can still put back an older log with its older head and older checkpoints, all together.
The number and hash that `partita audit verify` prints show that, kept elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from partita.checkpoint.disk import OWNER, Access, naming, sync_folder, write_durably
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import open_in, opened_folder
from partita.checkpoint.manifest import AuditMark
from partita.checkpoint.sealing import ID_BYTES, WRAPPED_BYTES, derived, keyed_hash, unwrap, wrap
from partita.checkpoint.strict_json import parse_json
from partita.checkpoint.user_key import KEY_BYTES, UserKey

LOG, HEAD = "audit.jsonl", "audit.head"
FORMAT: Literal["partita-audit"] = "partita-audit"
NO_LINE = AuditMark.model_construct(number=0, hash="0" * 64)  # before the first one

_UNFINISHED_HEAD = ".audit.head.new"
_WRAP, _LINES = b"partita audit key", b"partita audit lines"
_MAX_HEAD_BYTES = 4096
_MAX_LINE_BYTES = 8192
_HEX = r"^[0-9a-f]*$"

What = Literal[
    "saved", "failed", "loaded", "exported", "verified", "refused", "pruned", "imported", "encrypted", "rekeyed"
]


@dataclass(frozen=True)
class Event:
    """What was done with which checkpoint. checkpoint: its id in hex, "" where it is not known."""

    what: What
    tag: str
    checkpoint: str = ""


class Line(BaseModel):
    """A line of the log. time: ISO 8601, UTC. before: the hash of the line before. hash: over all else."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    number: int
    time: str
    user: str
    uid: int
    host: str
    pid: int
    what: str
    tag: str
    checkpoint: str
    before: str
    hash: str

    @property
    def mark(self) -> AuditMark:
        """By which a manifest names it."""
        return AuditMark.model_construct(number=self.number, hash=self.hash)


class _Head(BaseModel):
    """audit.head. id: random, of the log. key: the wrapped key of the log. number, hash: of the last line. check: the
    keyed hash of all else. Bytes are in hex."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["partita-audit"] = FORMAT
    version: Literal[1] = 1
    id: Annotated[str, Field(min_length=2 * ID_BYTES, max_length=2 * ID_BYTES, pattern=_HEX)]
    key: Annotated[str, Field(min_length=2 * WRAPPED_BYTES, max_length=2 * WRAPPED_BYTES, pattern=_HEX)]
    number: Annotated[int, Field(ge=0, lt=2**63)]
    hash: Annotated[str, Field(min_length=64, max_length=64, pattern=_HEX)]
    check: Annotated[str, Field(min_length=64, max_length=64, pattern=_HEX)]


@dataclass(frozen=True)
class LogKey:
    """What one log is written with. last: what its head says of the last line."""

    id: bytes
    secret: bytes
    last: AuditMark

    def hash_of(self, content: dict[str, Any]) -> str:
        """The keyed hash of a line, or of a head."""
        return keyed_hash(derived(self.secret, self.id, _LINES), content).hex()

    def line_of(self, text: bytes) -> Line | None:
        """A line, if it was written with this key. None: it was not, or is no line."""
        try:
            line = Line.model_validate(parse_json(text, LOG))
        except (CheckpointError, ValidationError):
            return None
        content = line.model_dump(exclude={"hash"})
        return line if secrets.compare_digest(self.hash_of(content), line.hash) else None


def append(directory: Path, key: UserKey, event: Event, access: Access = OWNER) -> AuditMark:
    """Adds a line, which is on the disk when this returns. The first one makes the log.

    Raises:
        CheckpointError: the log has another key, or lacks its head.
        OSError: what the system says.
    """
    with _locked(directory, access) as fd:
        log = _log_key(directory, key, fd)
        last = _last_line(fd, log)
        line = _line(event, last, log)
        _add(fd, json.dumps(line.model_dump()).encode() + b"\n")
        _write_head(directory, key, replace(log, last=line.mark), access)
        return line.mark


def read_key(directory: Path, key: UserKey) -> LogKey:
    """The key of a log that there is.

    Raises:
        CheckpointError: there is no log, it has another key, or its head was changed.
    """
    with opened_folder(directory, follow=True) as folder_fd:
        try:
            with os.fdopen(open_in(folder_fd, directory / HEAD), "rb") as file:
                data = file.read(_MAX_HEAD_BYTES + 1)
        except OSError as error:
            raise CheckpointError(f"'{directory / HEAD}' cannot be read: {error.strerror}") from None
    try:
        head = _Head.model_validate(parse_json(data, f"'{directory / HEAD}'"))
    except ValidationError:
        raise CheckpointError(f"'{directory / HEAD}' is not the head of an audit log: it was changed") from None
    log_id = bytes.fromhex(head.id)
    secret = unwrap(bytes.fromhex(head.key), key, log_id, _WRAP)
    if secret is None:
        raise CheckpointError(f"{key.source} does not hold the key of the audit log in '{directory}'")
    log = LogKey(log_id, secret, AuditMark.model_construct(number=head.number, hash=head.hash))
    if not secrets.compare_digest(log.hash_of(head.model_dump(exclude={"check"})), head.check):
        raise CheckpointError(f"'{directory / HEAD}' was changed: its hash does not fit")
    return log


def rewrap(directory: Path, old: UserKey, new: UserKey, access: Access = OWNER) -> None:
    """Gives the log's key to another user key. The old one does not open the log any more.

    Raises:
        CheckpointError, OSError: as for `append()`.
    """
    with _locked(directory, access):
        _write_head(directory, new, read_key(directory, old), access)


def has_log(directory: Path) -> bool:
    """Whether there is a log, or a part of one."""
    return any(os.path.lexists(directory / name) for name in (LOG, HEAD))


def lines(directory: Path) -> Iterator[bytes]:
    """The lines of a log, without their ends. One that is longer than any can be is cut.

    Raises:
        CheckpointError: there is no log, or it cannot be read.
    """
    with opened_folder(directory, follow=True) as folder_fd:
        fd = open_in(folder_fd, directory / LOG)
    with os.fdopen(fd, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            yield line.removesuffix(b"\n")


@contextmanager
def _locked(directory: Path, access: Access) -> Iterator[int]:
    """The log, opened for adding. No other process adds to it meanwhile, where the file system has locks."""
    path = directory / LOG
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, access.file)
    except OSError as error:
        raise CheckpointError(f"the audit log '{path}' cannot be written: {error.strerror}") from None
    try:
        with naming(path):
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_size == 0:
                with suppress(OSError):  # a file system without modes
                    os.fchmod(fd, access.file)
            yield fd
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _log_key(directory: Path, key: UserKey, fd: int) -> LogKey:
    """The key of the log, or of a new one."""
    if os.path.lexists(directory / HEAD):
        return read_key(directory, key)
    if os.fstat(fd).st_size:
        raise CheckpointError(
            f"'{directory / HEAD}' is not there, without which nothing can be added to '{directory / LOG}': bring it "
            "back, or move the log away"
        )
    return LogKey(secrets.token_bytes(ID_BYTES), secrets.token_bytes(KEY_BYTES), NO_LINE)


def _last_line(fd: int, log: LogKey) -> AuditMark:
    """The line to which the next one is bound. The head's, but for a line that was written when a process died."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, 2 * _MAX_LINE_BYTES, max(0, size - 2 * _MAX_LINE_BYTES)).split(b"\n")
    for text in reversed(tail):
        line = log.line_of(text) if text else None
        if line is not None:
            return line.mark if line.number > log.last.number else log.last
    return log.last


def _line(event: Event, last: AuditMark, log: LogKey) -> Line:
    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = ""
    content = {
        "number": last.number + 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "user": user,
        "uid": uid,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "what": event.what,
        "tag": event.tag,
        "checkpoint": event.checkpoint,
        "before": last.hash,
    }
    return Line.model_validate({**content, "hash": log.hash_of(content)})


def _add(fd: int, data: bytes) -> None:
    """One write at the end of the log: all of it is there afterwards, or nothing."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        data = b"\n" + data  # behind a line of a process that died
    written = 0
    try:
        written = os.write(fd, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            if written:
                os.ftruncate(fd, size)
        raise


def _write_head(directory: Path, key: UserKey, log: LogKey, access: Access) -> None:
    """Replaces the head, while the log is locked."""
    content = {
        "format": FORMAT,
        "version": 1,
        "id": log.id.hex(),
        "key": wrap(log.secret, key, log.id, _WRAP).hex(),
        "number": log.last.number,
        "hash": log.last.hash,
    }
    head = _Head.model_validate({**content, "check": log.hash_of(content)})
    unfinished = directory / _UNFINISHED_HEAD
    with suppress(FileNotFoundError):
        os.unlink(unfinished)  # of a process that died
    write_durably(unfinished, json.dumps(head.model_dump()).encode() + b"\n", access.file)
    os.rename(unfinished, directory / HEAD)
    sync_folder(directory)
