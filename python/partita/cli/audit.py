"""The commands `partita audit ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partita.checkpoint import CheckpointError, check_audit
from partita.cli.keys import KeyCommand, KeyEnv, KeyFile, key_from

app = typer.Typer(help="The audit log of a folder of encrypted checkpoints.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """The audit log of a folder of encrypted checkpoints."""


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder in which checkpoints were saved.")],
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
    holds: Annotated[
        str | None, typer.Option(help="NUMBER:HASH of a line, as printed once, that must be there.")
    ] = None,
) -> None:
    """Look for lines that were changed, removed, inserted or moved; 1 if there are any."""
    try:
        key = key_from(key_env, key_file, key_command)
        if key is None:
            raise CheckpointError("give the key: --key-env, --key-file or --key-command")
        checked = check_audit(folder, key)
    except (CheckpointError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    problems = list(checked.problems)
    if holds is not None and holds not in {f"{line.number}:{line.hash}" for line in checked.lines}:
        problems.append(f"the line {holds} is not there")
    for problem in problems:
        typer.echo(f"'{folder}': {problem}", err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"'{folder}': {len(checked.lines)} lines, all as they were written")
    typer.echo(f"the last one is {checked.last.number}:{checked.last.hash}")
