"""Command lines of the example jobs: what all of them have, and how numbers are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from common.job import JobError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any: of an option whose default is None, the help itself says what holds without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Help with the defaults; an error is one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        raise JobError(message)


def add_engine_arguments(group: argparse._ArgumentGroup, *, stages: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """--stage, --precision, --device, --seed and --config."""
    group.add_argument("--stage", type=int, choices=stages, default=1, help="ZeRO stage: what ranks share out")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the parameters")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, choices=("cpu", "cuda"), default=best, help="what computes")
    group.add_argument("--seed", type=seed, default=0, help="of the weights, the order of the data, the sample")
    config = "JSON (or YAML) whose keys replace those of the engine's config"
    group.add_argument("--config", type=Path, metavar="FILE", help=config)


def add_checkpoint_arguments(parser: Parser, folder: str, *, save_every: int) -> None:
    """--checkpoints, --no-checkpoints, --save-every and --keep."""
    count = number(int, 1)
    kept = parser.add_argument_group("checkpoints", "where there is one, the run goes on from it")
    what = "folder for checkpoints, which all hosts see; '' for none"
    kept.add_argument("--checkpoints", metavar="DIR", default=folder, help=what)
    kept.add_argument(
        "--no-checkpoints", dest="checkpoints", action="store_const", const="", help="as --checkpoints ''"
    )
    kept.add_argument("--save-every", type=count, default=save_every, help="steps between two checkpoints")
    kept.add_argument("--keep", type=count, default=2, help="how many checkpoints stay")


def device(text: str) -> str:
    """The type of --device, whose choices are "cpu" and "cuda"."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here; 'cpu' works everywhere")
    return text


def folder(text: str) -> Path:
    """The type of --out: a folder, or what can become one."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder; '.' is the one that you are in")
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a folder, or a name that is not there yet")
    return Path(text)


def number(
    kind: Callable[[str], float], low: float, high: float = math.inf, *, open_end: bool = False
) -> Callable[[str], float]:
    """Reads a finite number from `low` to `high`, without `low` itself if `open_end`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (open_end and value == low):
            what = "an integer" if kind is int else "a number"
            end = "" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {'above' if open_end else 'from'} {low}{end}")
        return value

    return parse


seed = number(int, 0, 2**32 - 1)  # what every generator of random numbers takes
