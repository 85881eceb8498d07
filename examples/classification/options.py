"""The command line of classify.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.arguments import Parser, add_checkpoint_arguments, add_engine_arguments, folder, number

KEPT_IN_OUT = "OUT/checkpoints"
PRETRAINED_LR, RANDOM_LR = 2e-4, 2e-3


class _Source(argparse.Action):
    """Of --model and --from-config the last one counts: `make classify` has one, and ARGS may have the other."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.model = namespace.from_config = None
        setattr(namespace, self.dest, values)


def parse_arguments(description: str) -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser(description)
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    data = parser.add_argument_group("texts")
    what = (
        "folder of <label>/*.txt, .csv or .jsonl; without it: news of the BBC, from data/bbc or the installed package"
    )
    data.add_argument("--data", type=Path, metavar="PATH", help=what)
    data.add_argument("--text-column", default="text", metavar="NAME", help="of a .csv or .jsonl file")
    data.add_argument("--label-column", default="label", metavar="NAME", help="of a .csv or .jsonl file")
    data.add_argument("--samples", type=count, help="use at most this many texts; without it: all")
    data.add_argument("--held-out", type=rate, default=0.2, help="share of each label that is not trained on")
    model = parser.add_argument_group("model")
    what = "pretrained: a folder, or a name of the hub"
    model.add_argument("--model", metavar="NAME", action=_Source, help=what)
    what = "random weights: bert-tiny, bert-mini, distilbert, bert-base-uncased, a config file, or a model's folder"
    model.add_argument("--from-config", metavar="CONFIG", action=_Source, default="bert-tiny", help=what)
    model.add_argument("--length", type=number(int, 8), default=96, help="tokens of a text that are read at the most")
    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=count, default=300, help="optimizer steps")
    run.add_argument("--batch-size", type=count, default=8, help="texts in a micro-batch of one rank")
    run.add_argument("--accumulate", type=count, default=1, help="micro-batches of each rank in one optimizer step")
    what = "highest learning rate of AdamW; without it: 2e-4 with pretrained weights, 2e-3 with random ones"
    run.add_argument("--lr", type=rate, help=what)
    add_engine_arguments(run)
    report = parser.add_argument_group("reports")
    report.add_argument("--log-every", type=count, default=10, help="steps between two lines")
    report.add_argument("--eval-every", type=count, default=50, help="steps between two evaluations")
    report.add_argument("--eval-samples", type=count, default=128, help="held-out texts in these; at the end all")
    report.add_argument("--out", type=folder, default=Path("runs/classify"), help="folder for the results")
    add_checkpoint_arguments(parser, KEPT_IN_OUT, save_every=50)
    args = parser.parse_args()
    if args.held_out >= 1:
        parser.error(f"--held-out {args.held_out:g} leaves nothing to train on: it is a share below 1")
    if args.lr is None:
        args.lr = PRETRAINED_LR if args.model else RANDOM_LR
    if args.checkpoints == KEPT_IN_OUT:
        args.checkpoints = str(args.out / "checkpoints")
    return args
