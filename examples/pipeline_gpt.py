"""Trains a small byte-level GPT as a pipeline: its layers are on several ranks, and micro-batches go through them.

    torchrun --nproc-per-node 2 examples/pipeline_gpt.py
    torchrun --nproc-per-node 4 examples/pipeline_gpt.py --pipe 2 --schedule zb-v --stage 1

With more ranks than --pipe there are several pipelines, and each trains on its own part of the data. The embedding and
the output layer share their weight, though they are on different ranks. Saves checkpoints into --checkpoints, and goes
on from the last one, with any other number of ranks, schedule and --chunks.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from common.arguments import Parser, number, seed
from common.job import JobError, config_from, run_on_ranks, say_where_it_begins
from common.terminal import Interrupts, Progress
from language.models import ModelConfig
from language.pipeline_layers import Norm, PipelineBlock, Positions, Tokens, logits, mean_loss
from language.text import Corpus, Windows, read_text, split, standard_library_text, unigram_entropy
from partita.pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch.utils.data import default_collate


def parse_arguments() -> argparse.Namespace:
    """What the user asks for; a bad value is a `JobError`."""
    parser = Parser((__doc__ or "").split("\n\n")[0])
    count, rate = number(int, 1), number(float, 0.0, open_end=True)
    data = parser.add_argument_group("text")
    data.add_argument(
        "--text", type=Path, metavar="FILE", help="train on this file; without it: Python's standard library"
    )
    data.add_argument("--megabytes", type=rate, default=4.0, help="use at most this much of the text")
    model = parser.add_argument_group("model")
    model.add_argument("--context", type=count, default=128, help="bytes that the model sees at once")
    model.add_argument("--layers", type=count, default=8, help="blocks of the GPT")
    model.add_argument("--width", type=count, default=128, help="size of the hidden states")
    model.add_argument("--heads", type=count, default=4, help="attention heads; they divide --width")
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument("--pipe", type=count, default=2, help="ranks that hold one model together")
    pipeline.add_argument("--schedule", default="1f1b", help="its name, or a file that `partita schedule` has written")
    pipeline.add_argument("--chunks", type=count, help="stages per rank; without it: as many as the schedule has")
    pipeline.add_argument("--micro-batches", type=count, default=8, help="of a pipeline in one optimizer step")
    pipeline.add_argument("--recompute", type=number(int, 0), default=0, help="keep the input of so many layers only")
    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=count, default=200, help="optimizer steps")
    run.add_argument("--batch-size", type=count, default=4, help="windows in a micro-batch")
    run.add_argument("--lr", type=rate, default=3e-3, help="highest learning rate of AdamW")
    run.add_argument(
        "--stage", type=int, choices=(0, 1, 2), default=1, help="ZeRO stage, among equal ranks of pipelines"
    )
    run.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the parameters")
    run.add_argument("--seed", type=seed, default=0, help="of the weights and the order of the data")
    config = "JSON (or YAML) whose keys replace those of the engine's config"
    run.add_argument("--config", type=Path, metavar="FILE", help=config)
    run.add_argument("--log-every", type=count, default=10, help="steps between two lines")
    kept = parser.add_argument_group("checkpoints", "where there is one, the run goes on from it")
    folder = "folder for checkpoints, which all hosts see; without it: no checkpoints"
    kept.add_argument("--checkpoints", metavar="DIR", help=folder)
    kept.add_argument("--save-every", type=count, default=100, help="steps between two checkpoints")
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.micro_batches,
        "pipeline": {
            "schedule": args.schedule,
            "chunks": args.chunks,
            "activation_checkpoint_interval": args.recompute,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": args.steps, "warmup_num_steps": max(2, args.steps // 20)},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "seed": args.seed,
        "steps_per_print": 0,
    }
    if args.checkpoints:
        config["checkpoint"] = {"dir": args.checkpoints, "interval_steps": args.save_every, "keep_last": 2}
    if args.precision != "fp32":
        config[args.precision] = {"enabled": True}
    return {**config, **config_from(args.config)}


def gpt(args: argparse.Namespace) -> PipelineModule:
    """Every rank builds its own layers only."""
    sizes = ModelConfig(context=args.context, layers=args.layers, heads=args.heads, width=args.width)
    layers = [
        TiedLayerSpec("tokens", Tokens, sizes),
        LayerSpec(Positions, sizes),
        *(LayerSpec(PipelineBlock, sizes) for _ in range(args.layers)),
        LayerSpec(Norm, sizes),
        TiedLayerSpec("tokens", Tokens, sizes, forward_fn=logits),
    ]
    return PipelineModule(layers, num_stages=args.pipe, loss_fn=mean_loss)


def held_out_loss(engine: Any, held_out: Windows, args: argparse.Namespace) -> float:
    """Mean over as many held-out windows as a step has, or fewer; every pipeline takes its share of them."""
    copies = dist.get_world_size() // args.pipe
    windows = held_out.spread(engine.train_batch_size())
    count = len(windows) // (args.batch_size * copies)
    mine = windows[dist.get_rank() % copies :: copies]

    def batches() -> Iterator[Any]:
        for first in range(0, count * args.batch_size, args.batch_size):
            yield default_collate([held_out[i] for i in mine[first : first + args.batch_size]])

    return float(engine.eval_batch(batches(), num_micro_batches=count))


def unigram(corpus: Corpus, windows: int) -> float:
    """The loss to beat on so many held-out windows, in nats per byte: of a model that knows how often each byte is."""
    targets = corpus.held_out.targets(corpus.held_out.spread(windows))
    return unigram_entropy(corpus.train.data, targets, vocabulary=256)


def train(engine: Any, args: argparse.Namespace, progress: Progress) -> None:
    """Trains up to step `args.steps`, and says how it goes."""
    started, first = time.perf_counter(), engine.global_steps
    while engine.global_steps < args.steps:
        loss = engine.train_batch()
        step = engine.global_steps
        progress.step()
        if step % args.log_every == 0 or step == args.steps:
            tokens = (step - first) * engine.train_batch_size() * args.context / (time.perf_counter() - started)
            progress.show(step, f"loss {loss.item():.3f} {tokens:,.0f} tokens/s")


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    ranks = dist.get_world_size()
    if ranks % args.pipe:
        how = f"torchrun --nproc-per-node {args.pipe} examples/pipeline_gpt.py"
        raise JobError(f"--pipe {args.pipe} does not divide the number of ranks, {ranks}: start it with {how}")
    max_bytes = int(args.megabytes * 1e6)
    text = standard_library_text(max_bytes) if args.text is None else read_text(args.text, max_bytes)
    windows = args.batch_size * ranks // args.pipe
    corpus = split(text, args.context, train_windows=windows, held_out_windows=windows)
    torch.manual_seed(args.seed)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # unless the engine takes it: after the last step it ends nothing
    try:
        engine, *_ = partita.initialize(gpt(args), training_data=corpus.train, config=engine_config(args))
    except ValueError as error:  # a config, a schedule or a division into stages that cannot be
        raise JobError(str(error)) from None
    speaks = dist.get_rank() == 0
    if not say_where_it_begins(engine, args.steps):
        engine.destroy()
        return False
    interrupts = Interrupts(saves=True, speaks=speaks) if args.checkpoints else None
    try:
        with Progress(args.steps, done=engine.global_steps, speaks=speaks) as progress:
            train(engine, args, progress)
    except partita.Preempted:  # a signal ended it: the engine has saved, and has said so
        return interrupts is not None and interrupts.requested
    validation = held_out_loss(engine, corpus.held_out, args)
    if speaks:
        pipelines = f"{ranks // args.pipe} x {args.pipe} ranks"
        beaten = f"by the bytes' frequencies alone {unigram(corpus, engine.train_batch_size()):.3f}"
        done = f"{args.schedule} on {pipelines}: {args.steps} steps"
        print(f"{done}, validation {validation:.3f} nats per byte; {beaten}", flush=True)
    engine.destroy()
    return False


def main() -> int:
    return run_on_ranks("pipeline_gpt.py", parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
