"""Options that say where a key is."""

from __future__ import annotations

from typing import Annotated

import typer

from partita.checkpoint import CheckpointError, KeySource, Protection
from partita.checkpoint.user_key import UserKey

KeyEnv = Annotated[str | None, typer.Option(help="An environment variable with the key of encrypted checkpoints.")]
KeyFile = Annotated[str | None, typer.Option(help="A file with the key.")]
KeyCommand = Annotated[str | None, typer.Option(help="A command that prints the key.")]


def key_from(env: str | None, file: str | None, command: str | None, options: str = "--key") -> UserKey | None:
    """The key that options name; None: they name none. `options`: how they begin.

    Raises:
        CheckpointError: it cannot be had, or there are several.
    """
    given = {"env": env, "file": file, "command": command}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        raise CheckpointError(f"{' and '.join(f'{options}-{name}' for name in named)}: give one of them")
    return KeySource(env, file, command).read()


def protection_from(env: str | None, file: str | None, command: str | None) -> Protection:
    """As `key_from()`."""
    return Protection(key=key_from(env, file, command))
