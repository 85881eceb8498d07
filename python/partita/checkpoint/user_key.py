"""The key of a user, which opens checkpoints: from an environment variable, a file or a command.

No message has anything of a key, nor of what stands in its place.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import shlex
import stat
import subprocess
from dataclasses import dataclass, field

from partita.checkpoint.errors import CheckpointError

KEY_BYTES = 32
COMMAND_TIMEOUT_S = 60
_MAX_TEXT_BYTES = 4096
# Of 32 random bytes, fewer than 16 differ once in 10^14 keys.
_MIN_DIFFERENT_BYTES = 16
_HEX = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{43}=?", re.ASCII)

_HOW = "make one with `partita checkpoint new-key`"


@dataclass(frozen=True)
class UserKey:
    """32 secret bytes. source: where they are from, for messages."""

    data: bytes = field(repr=False)
    source: str


@dataclass(frozen=True)
class KeySource:
    """Where a key is: exactly one of the name of an environment variable, the path of a file, and a command.

    Raises:
        ValueError: none is given, or several.
    """

    env: str | None = None
    file: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("env", "file", "command") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a key has one source: {' and '.join(given) if given else 'none'} given")

    def read(self) -> UserKey:
        """The key as it is now.

        Raises:
            CheckpointError: it is not there, others can read its file, the command fails, or it is no key. One line.
        """
        if self.env is not None:
            return parse_key(_from_environment(self.env), f"the environment variable {self.env}")
        if self.file is not None:
            return parse_key(_from_file(self.file), f"the key file '{self.file}'")
        return parse_key(_from_command(self.command or ""), f"the key command '{_program(self.command or '')}'")


def new_key() -> str:
    """A new key as text: 64 hex digits."""
    return secrets.token_hex(KEY_BYTES)


def parse_key(text: str, source: str) -> UserKey:
    """The key that is written in a text: 64 hex digits, or base64 of 32 bytes. White space around it is left out.

    Raises:
        CheckpointError: it is no key, or no random one. A passphrase is none: it could be guessed.
    """
    text = text.strip()
    data = b""
    if _HEX.fullmatch(text):
        data = bytes.fromhex(text)
    elif _BASE64.fullmatch(text):
        plain = text.rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(plain + "=", validate=True)
        except binascii.Error:
            data = b""
    if not text:
        raise CheckpointError(f"{source} is empty: {_HOW}")
    if len(data) != KEY_BYTES:
        raise CheckpointError(f"{source} holds no key, which is 64 hex digits or base64 of {KEY_BYTES} bytes: {_HOW}")
    if len(set(data)) < _MIN_DIFFERENT_BYTES:
        raise CheckpointError(f"{source} holds a key that is not random: {_HOW}")
    return UserKey(data, source)


def _from_environment(name: str) -> str:
    text = os.environ.get(name)
    if text is None:
        raise CheckpointError(f"the environment variable {name}, which is to hold the key, is not set")
    return text


def _from_file(path: str) -> str:
    """A link is followed: secrets are often given as links. What it leads to must be of its owner alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"the key file '{path}' cannot be read: {error.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"the key file '{path}' is no regular file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise CheckpointError(
                f"the key file '{path}' is open to others than its owner (mode {mode:04o}): chmod 600 it, and use a "
                "new key if others may have read it"
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise CheckpointError(f"the key file '{path}' is of another user: make it your own")
        return _decoded(file.read(_MAX_TEXT_BYTES + 1), f"the key file '{path}'")


def _from_command(command: str) -> str:
    """What the command prints. It has no input; its errors go where those of this process go."""
    name = f"the key command '{_program(command)}'"
    try:
        words = shlex.split(command)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{name} did not end within {COMMAND_TIMEOUT_S} s") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be run: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{name} is no command: {error}") from None
    if done.returncode:
        raise CheckpointError(f"{name} failed with exit code {done.returncode}")
    return _decoded(done.stdout, name)


def _program(command: str) -> str:
    """The first word: the others may be secret."""
    return (command.split() or [""])[0]


def _decoded(data: bytes, source: str) -> str:
    try:
        if len(data) <= _MAX_TEXT_BYTES:
            return data.decode("ascii")
    except UnicodeDecodeError:
        pass
    raise CheckpointError(
        f"{source} holds no key, which is 64 hex digits or base64 of {KEY_BYTES} bytes: {_HOW}"
    ) from None
