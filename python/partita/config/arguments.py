"""The config on a command line, under DeepSpeed's names."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from contextlib import suppress


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds `--deepspeed` (a flag) and `--deepspeed_config PATH` to a parser, which is returned.

    `initialize(args=parser.parse_args(), ...)` then trains with that config. An option that the parser has already
    stays as it is.
    """
    group = parser.add_argument_group("Partita", "options of the training engine, with DeepSpeed's names")
    with suppress(ArgumentError):
        group.add_argument("--deepspeed", action="store_true", help="for the program; the engine does not look at it")
    with suppress(ArgumentError):
        group.add_argument("--deepspeed_config", metavar="PATH", help="the config file of the engine")
    return parser
