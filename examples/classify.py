"""Trains a classifier of texts: BERT or DistilBERT of `transformers`, pretrained or of a config alone.

    torchrun --nproc-per-node 2 examples/classify.py                               a small BERT on news of the BBC
    torchrun --nproc-per-node 2 examples/classify.py --model distilbert-base-uncased --data mails.csv
    torchrun --nproc-per-node 2 examples/classify.py --model data/all-minilm-l6-v2 --data data/spam --stage 2

Saves checkpoints into OUT/checkpoints, and goes on from the last one: after Ctrl-C, a crash, or with other ranks.
Writes into --out: model/ (from_pretrained opens it), scores.json, confusion.png, predictions.csv, metrics.jsonl (for
`partita plot`). `evaluate.py OUT` tries the model on what was held out, or on other texts.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from classification.classifier import (
    Collate,
    Encoded,
    Encoding,
    digest_of,
    make_model,
    make_tokenizer,
    read_config,
    tokenizer_source,
)
from classification.evaluation import plot_confusion, probabilities, score, write_predictions
from classification.labelled import Labelled, majority, read_split
from classification.options import parse_arguments
from common.job import (
    FAILED,
    JobError,
    config_from,
    device_of_this_rank,
    run_on_ranks,
    save_end,
    say_where_it_begins,
    sum_over_ranks,
)
from common.terminal import Interrupts, Progress
from partita.checkpoint import CheckpointError
from partita.files import file_to_write
from torch import Tensor

WARMUP = 0.1  # of all steps
FILES = ("scores.json", "confusion.png", "predictions.csv")


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how texts become tokens.

    Attributes:
        encoded: of `train`. some: the held-out texts of the evaluations before the last one.
    """

    train: Labelled
    held_out: Labelled
    encoded: Encoded
    encoded_held_out: Encoded
    some: tuple[Labelled, Encoded]
    tokenizer: Any
    collate: Collate


# -- what is trained


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's config: from the command line, then from --config."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": args.steps,
                "warmup_max_lr": args.lr,
                "warmup_num_steps": max(2, round(WARMUP * args.steps)),
                "warmup_type": "linear",
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "seed": args.seed,
        "steps_per_print": 0,
        "monitor": {"dir": str(args.out), "progress": "off"},  # the example's own progress says it
    }
    if args.checkpoints:
        config["checkpoint"] = {
            "dir": args.checkpoints,
            "interval_steps": args.save_every,
            "keep_last": args.keep,
            "fallback": True,
        }
    if args.precision != "fp32":
        config[args.precision] = {"enabled": True}
    return {**config, **config_from(args.config)}


def texts_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides which texts are read and held out."""
    data = None if args.data is None else str(args.data)
    names = {"text": args.text_column, "label": args.label_column}
    return {"source": data, **names, "share": args.held_out, "seed": args.seed, "limit": args.samples}


def make_task(args: argparse.Namespace) -> tuple[Task, Any]:
    """The texts, split and as tokens, and the config of a model for their labels."""
    data, (train, held_out) = read_split(**texts_of(args))
    needed = args.batch_size * dist.get_world_size()
    if len(train) < needed:
        raise JobError(f"{len(train)} texts to train on, fewer than the {needed} of a batch: lower --batch-size")
    config = read_config(args.model, args.from_config, data.labels)
    longest = getattr(config, "max_position_embeddings", args.length)
    if args.length > longest:
        raise JobError(f"--length {args.length} is more than the {longest} tokens that the model can read")
    source = tokenizer_source(args.model, args.from_config)
    tokenizer = make_tokenizer(source, train.texts(), config.vocab_size)
    tokenizer.model_max_length = args.length
    few = held_out.at(range(0, len(held_out), max(1, len(held_out) // args.eval_samples)))

    def encoded(part: Labelled) -> Encoded:
        return Encoded(tokenizer, part.texts(), part.classes(), args.length)

    task = Task(train, held_out, encoded(train), encoded(held_out), (few, encoded(few)), tokenizer, Collate(tokenizer))
    if dist.get_rank() == 0:
        repeated = f" ({data.repeated:,} more repeat another)" if data.repeated else ""
        what = f"{len(train):,} texts to train on and {len(held_out):,} held out{repeated}"
        print(f"{what}; labels: {', '.join(data.labels)}", file=sys.stderr, flush=True)
    return task, config


def make_engine(args: argparse.Namespace, task: Task, config: Any) -> tuple[partita.Engine, Iterator[Any]]:
    """The engine, and this rank's micro-batches without end."""
    torch.manual_seed(args.seed)
    model = make_model(config, args.model).to(device_of_this_rank(args.device))
    try:
        engine, _, loader, _ = partita.initialize(
            model, training_data=task.encoded, collate_fn=task.collate, config=engine_config(args)
        )
    except CheckpointError as error:  # the folder, or what is in it, is not for this run
        raise JobError(f"{error} (--checkpoints DIR takes another folder)", FAILED) from None
    except ValueError as error:  # a ConfigError, or what the config asks for does not fit the model or the data
        raise JobError(str(error)) from None
    assert loader is not None  # there is training data
    state = {"labels": list(task.train.labels), "vocabulary": digest_of(task.tokenizer)}
    for name, value in state.items():
        if engine.client_state.get(name, value) != value:
            raise JobError(
                f"the checkpoints in {args.checkpoints} are of other {name}: --checkpoints DIR takes another"
            )
    engine.client_state = state
    return engine, loader.repeat()


# -- training


def train(
    engine: partita.Engine,
    batches: Iterator[Any],
    task: Task,
    args: argparse.Namespace,
    progress: Progress,
    interrupts: Interrupts,
) -> bool:
    """Trains up to step `args.steps`; True if Ctrl-C ended it earlier."""
    total, micro_steps, quality = 0.0, 0, ""
    engine.train()
    for step in range(engine.global_steps + 1, args.steps + 1):
        # Dropout draws from here: the same in a run that goes on from a checkpoint, and other on each rank.
        torch.manual_seed(args.seed + step * engine.world_size + engine.global_rank)
        total += engine.train_batch(batches).item()
        micro_steps += 1
        progress.step()
        if step % args.log_every and step % args.eval_every and step != args.steps:
            continue
        sum_of_ranks, stop = sum_over_ranks(engine, total, float(interrupts.ends_loop))
        loss = sum_of_ranks / (micro_steps * engine.world_size)
        if step % args.eval_every == 0 and step != args.steps:
            part, encoded = task.some
            accuracy = float((predict(engine, encoded, task).argmax(1) == part.classes()).mean())
            engine.log({"accuracy": accuracy})
            quality = f" accuracy {accuracy:.1%} of {len(part)}"
        progress.show(step, f"loss {loss:.3f}{quality} lr {engine.get_lr()[0]:.2g}")
        if stop:
            return True
        total, micro_steps = 0.0, 0
    return False


def predict(engine: partita.Engine, data: Encoded, task: Task) -> Any:
    """The probability of each label for each sample. All ranks call it."""

    def logits(batch: Encoding) -> Tensor:
        found: Tensor = engine.eval_batch(batch).logits
        return found

    return probabilities(logits, data, task.collate, engine.train_micro_batch_size_per_gpu())


# -- what it learned


def save_results(engine: partita.Engine, task: Task, args: argparse.Namespace, *, interrupted: bool) -> None:
    """Writes the files of --out, and prints how good the model is. All ranks call it."""
    folder = args.out / "model"
    engine.save_model(folder)
    probability = predict(engine, task.encoded_held_out, task)
    if engine.global_rank != 0:
        return
    engine.module.config.architectures = [type(engine.module).__name__]  # by which one sees what the folder holds
    engine.module.config.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    scores = score(probability, task.held_out)
    label, baseline = majority(task.train, task.held_out)
    millions = sum(parameter.numel() for parameter in engine.module.parameters()) / 1e6
    source = f"{Path(args.model).name}, pretrained" if args.model else f"{Path(args.from_config).name}, random weights"
    title = f"{source}, {millions:.1f} M parameters, {engine.global_steps} steps: {scores.accuracy:.1%} right"
    plot_confusion(scores, task.held_out.labels, title, args.out / "confusion.png")
    write_predictions(args.out / "predictions.csv", probability, task.held_out)
    facts = {"model": source, "steps": engine.global_steps, "majority_accuracy": baseline, **scores.as_json()}
    there = args.data and str(args.data.resolve())
    facts["texts"] = {**texts_of(args), "source": there}  # by which evaluate.py finds what was held out
    (args.out / "scores.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, value in scores.f1.items():
        print(f"  {name:20} F1 {value:.3f}")
    print(
        f"{'interrupted; ' if interrupted else ''}{source}: {scores.in_a_line()}; always {label!r}: {baseline:.1%}; "
        f"results in {args.out}",
        flush=True,
    )


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    task, config = make_task(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        file_to_write(args.out / name)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # unless the engine takes it: after the last step it ends nothing
    engine, batches = make_engine(args, task, config)
    if not say_where_it_begins(engine, args.steps):
        engine.destroy()
        return False
    speaks = engine.global_rank == 0
    interrupts = Interrupts(saves=engine.config.checkpoint.dir is not None, speaks=speaks)
    try:
        with Progress(args.steps, done=engine.global_steps, speaks=speaks) as progress:
            interrupted = train(engine, batches, task, args, progress, interrupts)
    except partita.Preempted:  # the engine has saved, and has said so
        engine.destroy()
        return interrupts.requested
    save_results(engine, task, args, interrupted=interrupted)
    save_end(engine)
    engine.destroy()
    return interrupted


def main() -> int:
    return run_on_ranks("classify.py", lambda: parse_arguments((__doc__ or "").split("\n\n")[0]), run)


if __name__ == "__main__":
    sys.exit(main())
