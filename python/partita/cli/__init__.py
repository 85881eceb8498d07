"""The command `partita`."""

from partita.cli.main import main

__all__ = ["main"]
