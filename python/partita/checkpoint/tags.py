"""Names in a folder of checkpoints: tags, and the hidden names of what is being saved, replaced or removed. Pure."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.manifest import plain_name

LATEST = "latest"
# A name has at most 255 bytes on Linux; a hidden name is 18 bytes longer than its tag.
MAX_TAG_BYTES = 200

_LEFTOVER = re.compile(r"\.(?P<tag>.+)\.(?P<kind>partial|old)-(?P<token>[0-9a-f]{8})")
_LOCK = re.compile(r"\.lock-(?P<token>[0-9a-f]{8})")


@dataclass(frozen=True)
class Leftover:
    """What a hidden name says. set_aside: a checkpoint that a new one of its tag was to replace; else it is nothing.
    token: of the save or removal that gave the name."""

    tag: str
    set_aside: bool
    token: str


def check_tag(tag: str) -> str:
    """The tag, if a folder can have this name and no other place is meant.

    Raises:
        CheckpointError: it is empty, hidden, too long, "latest", has a separator or an unprintable character, or
            begins or ends with a space.
    """
    if not isinstance(tag, str):
        raise CheckpointError(f"the tag of a checkpoint is a text such as 'step100', not {tag!r}")
    try:
        plain_name(tag)
        size = len(tag.encode())
    except ValueError:
        wrong = "it is not a plain name"
    else:
        if tag.startswith("."):
            wrong = "hidden names are those of unfinished saves"
        elif tag.casefold() == LATEST:
            wrong = f"the file '{LATEST}' says which checkpoint is the latest"
        elif tag != tag.strip():
            wrong = "it begins or ends with a space"
        elif size > MAX_TAG_BYTES:
            wrong = f"it has {size} bytes, and at most {MAX_TAG_BYTES} are possible"
        else:
            return tag
    shown = f"{tag[:60]!a}..." if len(tag) > 60 else f"{tag!a}"
    raise CheckpointError(f"{shown} cannot be the tag of a checkpoint, which is the name of its folder: {wrong}")


def new_token() -> str:
    """What the hidden names of one save, or of one removal, end with."""
    return secrets.token_hex(4)


def partial_name(tag: str, token: str) -> str:
    """A hidden name for what is no checkpoint: not one yet, or not one any more."""
    return f".{tag}.partial-{token}"


def aside_name(tag: str, token: str) -> str:
    """A hidden name for a whole checkpoint while another takes its place."""
    return f".{tag}.old-{token}"


def lock_name(token: str) -> str:
    """The file whose lock says that the names with this token are in use."""
    return f".lock-{token}"


def parse_leftover(name: str) -> Leftover | None:
    """What a name of `partial_name()` or `aside_name()` stands for. None: the name is neither."""
    found = _LEFTOVER.fullmatch(name)
    return None if found is None else Leftover(found["tag"], found["kind"] == "old", found["token"])


def parse_lock(name: str) -> str | None:
    """The token of a name of `lock_name()`. None: the name is none."""
    found = _LOCK.fullmatch(name)
    return None if found is None else found["token"]
