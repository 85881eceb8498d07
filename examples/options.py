"""The command line of pretrain_lm.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class JobError(Exception):
    """Ends the program; the message is one line that says what to do.

    Attributes:
        code: the exit status.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()), code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        raise JobError(message)


def parse_arguments(description: str) -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    data = parser.add_argument_group("text")
    data.add_argument("--text", type=Path, metavar="FILE", help="train on this file; None: Python's standard library")
    data.add_argument("--megabytes", type=rate, default=16.0, help="use at most this much of the text")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=("gpt", "lstm"), default="gpt", help="architecture")
    model.add_argument("--context", type=count, default=128, help="bytes that the model sees at once")
    model.add_argument("--layers", type=count, default=4, help="blocks of the GPT, or layers of the LSTM")
    model.add_argument("--width", type=count, default=128, help="size of the hidden states")
    model.add_argument("--heads", type=count, default=4, help="attention heads of the GPT; they divide --width")
    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=count, default=1000, help="optimizer steps")
    run.add_argument("--batch-size", type=count, default=8, help="windows in a micro-batch of one rank")
    run.add_argument("--accumulate", type=count, default=1, help="micro-batches of each rank in one optimizer step")
    run.add_argument("--lr", type=rate, default=3e-3, help="highest learning rate of AdamW")
    run.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage: what ranks share out")
    run.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the parameters")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", choices=("cpu", "cuda"), default=best, help="what computes")
    run.add_argument("--seed", type=number(int, 0), default=0, help="of the weights, the order of the data, the sample")
    run.add_argument("--config", type=Path, metavar="FILE", help="JSON whose keys replace those of the engine's config")
    report = parser.add_argument_group("reports")
    report.add_argument("--log-every", type=count, default=10, help="steps between two rows of metrics")
    report.add_argument("--eval-every", type=count, default=100, help="steps between two validations")
    report.add_argument("--eval-windows", type=count, default=256, help="held-out windows in a validation")
    report.add_argument("--prompt", default="def ", help="what the sample begins with")
    report.add_argument("--sample-bytes", type=number(int, 0), default=500, help="length of the sample")
    report.add_argument("--temperature", type=rate, default=0.7, help="of the sample; lower is more predictable")
    report.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="folder for the results")
    kept = parser.add_argument_group("checkpoints", "where there is one, the run goes on from it")
    folder = "folder for checkpoints, which all hosts see; '' for none"
    kept.add_argument("--checkpoints", metavar="DIR", default="checkpoints/pretrain_lm", help=folder)
    kept.add_argument(
        "--no-checkpoints", dest="checkpoints", action="store_const", const="", help="as --checkpoints ''"
    )
    kept.add_argument("--save-every", type=count, default=100, help="steps between two checkpoints")
    kept.add_argument("--keep", type=count, default=2, help="how many checkpoints stay")
    args = parser.parse_args()
    if args.model == "gpt" and args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if not args.prompt:
        parser.error("--prompt is empty: the model needs at least one byte to go on from")
    return args


def number(kind: Callable[[str], float], low: float, *, open_end: bool = False) -> Callable[[str], float]:
    """Reads a finite number from `low` on, without `low` itself if `open_end`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (open_end and value == low):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {'above' if open_end else 'from'} {low}")
        return value

    return parse
