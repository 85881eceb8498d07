"""The command line of finetune_chat.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.arguments import Parser, add_checkpoint_arguments, add_engine_arguments, folder, number

MODEL = Path(__file__).parents[1] / "configs" / "chat_model.json"


def parse_arguments(description: str) -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser(description)
    count, rate, share = number(int, 1), number(float, 0.0, open_end=True), number(float, 0.0)
    data = parser.add_argument_group("dialogues")
    default = Path("data/dialogues.jsonl")
    data.add_argument("--data", type=Path, metavar="FILE", default=default, help="JSON lines with `messages`")
    data.add_argument("--held-out", type=rate, default=0.1, help="share of the openings that is not trained on")
    data.add_argument("--limit", type=count, metavar="N", help="use the first N dialogues only")
    data.add_argument(
        "--context", type=count, default=128, help="tokens in a row; longer dialogues lose their beginning"
    )
    data.add_argument("--padding", action="store_true", help="one dialogue in each row; without it, rows are packed")
    model = parser.add_argument_group("model")
    what = "a folder or a hub's name for from_pretrained; or a config (.json) of a new model"
    model.add_argument("--model", default=str(MODEL), help=what)
    model.add_argument("--vocabulary", type=count, default=1024, help="tokens of a new model's tokenizer")
    run = parser.add_argument_group("fine-tuning")
    run.add_argument("--steps", type=count, default=240, help="optimizer steps on the data before the rounds")
    run.add_argument("--batch-size", type=count, default=8, help="rows of the data in a step, over all ranks")
    run.add_argument("--accumulate", type=count, default=1, help="micro-batches of each rank in one optimizer step")
    run.add_argument("--lr", type=rate, default=4e-3, help="highest learning rate of AdamW")
    add_engine_arguments(run)
    rounds = parser.add_argument_group("self-training")
    rounds.add_argument("--rounds", type=number(int, 0), default=3, help="how often answers are drawn and trained on")
    rounds.add_argument("--round-steps", type=count, default=40, help="optimizer steps in a round")
    rounds.add_argument("--round-lr", type=rate, default=0.2, help="learning rate of the rounds, as a share of --lr")
    rounds.add_argument("--histories", type=count, default=256, help="of the training data that are answered")
    rounds.add_argument("-k", "--candidates", type=count, default=6, help="answers that are drawn for each history")
    rounds.add_argument("--temperature", type=rate, default=0.8, help="of the drawn answers")
    rounds.add_argument("--top-p", type=rate, default=0.95, help="draw among the likeliest tokens of this probability")
    rounds.add_argument("--alpha", type=share, default=0.5, help="J = alpha L_data + (1 - alpha) L_gen")
    scores = "reference (token F1), likelihood, or MODULE:FUNCTION(messages, answer, references)"
    rounds.add_argument("--score", default="reference", help=scores)
    rounds.add_argument("--threshold", type=float, help="the least score of an answer that is kept; without it: any")
    keep = ("better", "best")
    which = "the best answer to each history: only if it beats the greedy one, or always"
    rounds.add_argument("--keep-answers", choices=keep, default="better", help=which)
    rounds.add_argument("--answer-tokens", type=count, default=32, help="the longest answer that is generated")
    rounds.add_argument("--generate-batch", type=count, default=128, help="answers that a rank generates at once")
    where = "what answers: the trained model, gathered as a whole, or a second one that takes over its weights"
    rounds.add_argument("--generator", choices=("gathered", "separate"), default="gathered", help=where)
    rounds.add_argument("--bucket-mb", type=rate, default=64.0, help="weights under way to a second one at once")
    report = parser.add_argument_group("reports")
    report.add_argument("--log-every", type=count, default=10, help="steps between two lines of progress")
    report.add_argument(
        "--samples", type=number(int, 0), default=4, help="held-out answers that are printed at the end"
    )
    report.add_argument("--out", type=folder, default=Path("runs/chat"), help="folder for the model and the report")
    add_checkpoint_arguments(parser, "checkpoints/finetune_chat", save_every=50)
    args = parser.parse_args()
    if args.alpha > 1:
        parser.error(f"--alpha {args.alpha} is above 1")
    if args.held_out >= 1:
        parser.error(f"--held-out {args.held_out} leaves nothing to train on: it is a share below 1")
    if args.answer_tokens >= args.context:
        parser.error(f"--answer-tokens {args.answer_tokens} leaves no room in --context {args.context} for a history")
    return args
