"""The command line of pretrain_lm.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.arguments import Parser, add_checkpoint_arguments, add_engine_arguments, folder, number

from language.tokens import BYTES

WORDS = 10_000  # tokens of a byte-pair encoding, unless the user says otherwise


def parse_arguments(description: str) -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser(description)
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    data = parser.add_argument_group("text")
    data.add_argument(
        "--text", type=Path, metavar="FILE", help="train on this file; without it: Python's standard library"
    )
    data.add_argument("--megabytes", type=rate, default=16.0, help="use at most this much of the text")
    kinds = "bytes, or pieces that byte-pair encoding learns from the training part"
    data.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help=kinds)
    data.add_argument(
        "--vocabulary", type=number(int, 257), help="tokens of bpe; without it: 10000 (of bytes it is 256)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=("gpt", "lstm"), default="gpt", help="architecture")
    model.add_argument("--context", type=count, default=128, help="tokens that the model sees at once")
    model.add_argument("--layers", type=count, default=4, help="blocks of the GPT, or layers of the LSTM")
    model.add_argument("--width", type=count, default=128, help="size of the hidden states")
    model.add_argument("--hidden", dest="width", type=count, help="another name of --width")
    model.add_argument("--embedding", type=count, help="size of the token embedding; without it: as --width")
    model.add_argument("--heads", type=count, default=4, help="attention heads of the GPT; they divide --width")
    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=count, default=1000, help="optimizer steps")
    run.add_argument("--batch-size", type=count, default=8, help="windows in a micro-batch of one rank")
    run.add_argument("--accumulate", type=count, default=1, help="micro-batches of each rank in one optimizer step")
    run.add_argument("--lr", type=rate, default=3e-3, help="highest learning rate of AdamW")
    add_engine_arguments(run)
    first = parser.add_argument_group("embedding", "learned before the model, by an autoencoder of tokens' neighbours")
    first.add_argument("--autoencoder", action="store_true", help="begin with the autoencoder's embedding")
    first.add_argument("--autoencoder-steps", type=count, default=300, help="its optimizer steps")
    first.add_argument("--autoencoder-lr", type=rate, default=2e-3, help="its highest learning rate")
    first.add_argument("--compare", action="store_true", help="also train from a cold start, and print the gain")
    report = parser.add_argument_group("reports")
    report.add_argument("--log-every", type=count, default=10, help="steps between two rows of metrics")
    report.add_argument("--eval-every", type=count, default=100, help="steps between two validations")
    report.add_argument("--eval-windows", type=count, default=256, help="held-out windows in a validation")
    report.add_argument("--prompt", default="def ", help="what the sample begins with")
    report.add_argument("--sample-length", type=number(int, 0), default=500, help="tokens of the sample")
    report.add_argument("--temperature", type=rate, default=0.7, help="of the sample; lower is more predictable")
    report.add_argument("--out", type=folder, default=Path("runs/pretrain"), help="folder for the results")
    add_checkpoint_arguments(parser, "checkpoints/pretrain_lm", save_every=100)
    args = parser.parse_args()
    if args.model == "gpt" and args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if not args.prompt:
        parser.error("--prompt is empty: the model needs at least one byte to go on from")
    if args.tokenizer == "bytes" and args.vocabulary is not None:
        parser.error(f"--vocabulary {args.vocabulary} is of --tokenizer bpe: there are 256 bytes")
    if args.compare and not args.autoencoder:
        parser.error("--compare is with --autoencoder: it shows what that gains over a cold start")
    if args.vocabulary is None:
        args.vocabulary = BYTES if args.tokenizer == "bytes" else WORDS
    return args
