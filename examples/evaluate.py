"""Evaluates a model that an example has trained: a folder of results, a checkpoint, or a Hugging Face folder.

    python examples/evaluate.py runs/pretrain                     its loss on what was held out, and a sample
    python examples/evaluate.py checkpoints/pretrain_lm           the same of the newest checkpoint
    python examples/evaluate.py runs/pretrain --text book.txt     on another text
    python examples/evaluate.py runs/chat --dialogues FILE        on dialogues, the assistant's tokens only
    python examples/evaluate.py runs/classify --data data/bbc     a classifier on labelled texts

Language models: perplexity, nats per token, bits per byte, samples. Classifiers: accuracy, F1, confusion matrix.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.arguments import Parser, number, seed
from common.job import JobError, process_group, run_job


def parse_arguments() -> argparse.Namespace:
    parser = Parser((__doc__ or "").split("\n\n")[0])
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    parser.add_argument("path", type=Path, metavar="PATH", help="results of a run, a checkpoint, or a model's folder")
    text = parser.add_argument_group("language models")
    text.add_argument(
        "--text", type=Path, metavar="FILE", help="evaluate on this; without it: what its training held out"
    )
    text.add_argument("--megabytes", type=rate, default=1.0, help="use at most this much of the text")
    text.add_argument("--dialogues", type=Path, metavar="FILE", help="evaluate on JSON lines of dialogues")
    text.add_argument("--prompt", help="what samples begin with; without it: the beginning of the text")
    text.add_argument("--samples", type=number(int, 0), default=1, help="how many samples to write")
    text.add_argument("--sample-length", type=count, default=200, help="tokens of a sample")
    text.add_argument("--temperature", type=rate, default=0.7, help="of the samples; lower is more predictable")
    text.add_argument("--seed", type=seed, default=0, help="of the samples")
    labelled = parser.add_argument_group("classifiers")
    what = "folder of <label>/*.txt, .csv or .jsonl; without it: what its training held out"
    labelled.add_argument("--data", type=Path, metavar="PATH", help=what)
    labelled.add_argument("--text-column", default="text", metavar="NAME", help="of a .csv or .jsonl file")
    labelled.add_argument("--label-column", default="label", metavar="NAME", help="of a .csv or .jsonl file")
    return parser.parse_args()


def evaluate_language_model(args: argparse.Namespace) -> None:
    from language.evaluation import (
        baseline,
        continuation,
        dialogue_loss,
        held_out_of,
        open_language_model,
        read_text,
        text_loss,
    )

    model = open_language_model(args.path)
    print(model.name, flush=True)
    if args.dialogues is not None:
        print(f"{args.dialogues}: {dialogue_loss(model, args.dialogues)}", flush=True)
    max_bytes, text = int(args.megabytes * 1e6), b""
    if args.text is not None:
        text = read_text(args.text, max_bytes)
        print(f"{args.text}: {text_loss(model, text)}", flush=True)
    elif args.dialogues is None:
        text, train, where = held_out_of(model, max_bytes)
        loss, unigram = text_loss(model, text), baseline(model, train, text)
        print(f"{where}: {loss}", flush=True)
        bits = unigram.bits_per_byte - loss.bits_per_byte
        won = f"beats it by {bits:.4f}" if bits > 0 else f"does not beat it: it is {-bits:.4f} worse, in"
        print(f"unigram entropy: {unigram.mean:.4f} nats per token; the model {won} bits per byte", flush=True)
    prompt = args.prompt or text[:40].decode(errors="ignore") or "The "
    for number_of_sample in range(args.samples):
        seed = args.seed + number_of_sample
        written = continuation(model, prompt, args.sample_length, temperature=args.temperature, seed=seed)
        print(f"\n-- sample {number_of_sample + 1}\n{written}", flush=True)


def require_none(args: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    """Refuses options that would do nothing; `what` they are of."""
    for name in names:
        if getattr(args, name) is not None:
            raise JobError(f"--{name} is of {what}")


def job() -> bool:
    from classification.evaluation import classifier_at, evaluate_classifier
    from language.evaluation import is_language_model

    args = parse_arguments()
    if not args.path.exists():
        raise JobError(f"{args.path} is not there: give the --out folder of a run, a checkpoint or a model's folder")
    if (folder := classifier_at(args.path)) is not None:
        require_none(args, ("text", "dialogues", "prompt"), f"language models, and {folder} is a classifier")
        with process_group("cpu"):
            columns = {"text": args.text_column, "label": args.label_column}
            print(f"{folder}\n{evaluate_classifier(folder, args.data, **columns)}", flush=True)
        return False
    if not is_language_model(args.path):
        raise JobError(
            f"{args.path} is no model of the examples: a language model's folder has model.json (or is below one that "
            "has), a Hugging Face folder has a config.json whose architectures are of a causal language model or a "
            "sequence classifier"
        )
    require_none(args, ("data",), f"classifiers, and {args.path} is a language model")
    evaluate_language_model(args)
    return False


def main() -> int:
    return run_job("evaluate.py", job)


if __name__ == "__main__":
    sys.exit(main())
