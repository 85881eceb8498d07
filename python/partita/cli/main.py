"""The entry point: finds the commands, or says what to install for them."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    if sys.argv[1:2] == ["run"]:  # without typer
        from partita.cli.program import run

        return run(sys.argv[2:])
    try:
        from partita.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"partita: the command line needs {error.name}: pip install 'partita[cli]'")
    app()
