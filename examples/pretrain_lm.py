"""Pretrains a small byte-level language model with Partita, on one process or on many ranks.

    torchrun --nproc-per-node 2 examples/pretrain_lm.py
    python examples/launch.py --standalone --nproc-per-node 2 examples/pretrain_lm.py
    python examples/pretrain_lm.py --text book.txt --stage 1 --precision bf16

Saves checkpoints into --checkpoints, and goes on from the last one: after Ctrl-C, a crash, or with other ranks.
Writes into --out: model.safetensors, model.json (its sizes), config.json (the engine's), metrics.csv, loss.png,
sample.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import partita
import torch
import torch.distributed as dist
from common.job import (
    FAILED,
    JobError,
    config_from,
    device_of_this_rank,
    process_group,
    run_job,
    save_end,
    say_where_it_begins,
    sum_over_ranks,
)
from common.models import GPT, LSTM, ModelConfig
from common.pretrain_options import parse_arguments
from common.report import MetricsFile, Row, plot_losses
from common.terminal import Interrupts, Progress
from common.text import Corpus, Windows, read_text, split, standard_library_text
from partita.checkpoint import CheckpointError
from partita.files import file_to_write
from torch import Tensor
from torch.utils.data import default_collate

MODELS = {"gpt": GPT, "lstm": LSTM}
WARMUP = 0.05  # of all steps
FILES = ("model.safetensors", "model.json", "config.json", "metrics.csv", "loss.png", "sample.txt")


# -- what is trained


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's config: from the command line, then from --config."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": args.steps,
                "warmup_num_steps": max(2, round(WARMUP * args.steps)),
                "warmup_type": "linear",
                "cos_min_ratio": 0.02,
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage},
        "seed": args.seed,
        "steps_per_print": 0,  # the progress bar says it
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


def load_corpus(args: argparse.Namespace) -> Corpus:
    max_bytes = int(args.megabytes * 1e6)
    text = standard_library_text(max_bytes) if args.text is None else read_text(args.text, max_bytes)
    ranks = dist.get_world_size()
    return split(text, args.context, train_windows=args.batch_size * ranks, held_out_windows=ranks)


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(context=args.context, layers=args.layers, heads=args.heads, width=args.width)


def make_engine(args: argparse.Namespace, train: Windows) -> tuple[partita.Engine, Iterator[Any]]:
    """The engine, and this rank's micro-batches without end."""
    torch.manual_seed(args.seed)
    model = MODELS[args.model](model_config(args)).to(device_of_this_rank(args.device))
    try:
        engine, _, loader, _ = partita.initialize(model, training_data=train, config=engine_config(args))
    except CheckpointError as error:  # the folder, or what is in it, is not for this run
        raise JobError(f"{error} (--checkpoints DIR takes another folder)", FAILED) from None
    except ValueError as error:  # a ConfigError, or what the config asks for does not fit the model or the data
        raise JobError(str(error)) from None
    assert loader is not None  # there is training data
    return engine, loader.repeat()


# -- training


def train(
    engine: partita.Engine,
    batches: Iterator[Any],
    held_out: Windows,
    args: argparse.Namespace,
    metrics: MetricsFile,
    progress: Progress,
    interrupts: Interrupts,
) -> bool:
    """Trains up to step `args.steps` and adds rows to `metrics`; True if Ctrl-C ended it earlier."""
    step_tokens = engine.train_batch_size() * args.context
    first = engine.global_steps
    if first == 0:
        metrics.add(measure(engine, val_loss=validate(engine, held_out, args.eval_windows)))
    total, started = torch.zeros((), device=engine.device), time.perf_counter()
    for step in range(first + 1, args.steps + 1):
        count_tokens(engine, step_tokens)
        for _ in range(engine.gradient_accumulation_steps()):
            tokens, targets = (part.to(engine.device, non_blocking=True) for part in next(batches))
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        progress.step()
        if step % args.log_every and step % args.eval_every and step != args.steps:
            continue
        # Only here does the host look at numbers: in between, an accelerator would run on without waiting.
        total_of_ranks, stop = sum_over_ranks(engine, total.item(), float(interrupts.ends_loop))
        seconds, steps = time.perf_counter() - started, step - first
        loss_mean = total_of_ranks / (steps * engine.gradient_accumulation_steps() * engine.world_size)
        last = step == args.steps or stop > 0
        val_loss = validate(engine, held_out, args.eval_windows) if last or step % args.eval_every == 0 else None
        metrics.add(measure(engine, loss=loss_mean, val_loss=val_loss, tokens_per_s=steps * step_tokens / seconds))
        progress.show(step, in_a_line(metrics.rows))
        if stop:
            return True
        total, first, started = torch.zeros_like(total), step, time.perf_counter()
    return False


def in_a_line(rows: list[Row]) -> str:
    row, held_out = rows[-1], [row.val_loss for row in rows if row.val_loss is not None]
    validation = f"{held_out[-1]:.3f}" if held_out else "-"
    return (
        f"loss {row.loss:.3f} val {validation} {row.tokens_per_s:,.0f} tokens/s lr {row.lr:.2g} "
        f"norm {row.grad_norm:.2f} scale {row.loss_scale:g} skipped {row.skipped_steps}"
    )


def count_tokens(engine: partita.Engine, step_tokens: int) -> None:
    """Notes what the next step's checkpoint says of the run."""
    tokens = engine.client_state.get("tokens", 0) + step_tokens
    engine.client_state = {"tokens": tokens, "batch": engine.train_batch_size()}


def measure(
    engine: partita.Engine, *, val_loss: float | None, loss: float | None = None, tokens_per_s: float | None = None
) -> Row:
    return Row(
        step=engine.global_steps,
        loss=loss,
        val_loss=val_loss,
        bits_per_byte=None if val_loss is None else val_loss / math.log(2),
        tokens_per_s=tokens_per_s,
        lr=engine.get_lr()[0],
        grad_norm=engine.get_global_grad_norm(),
        loss_scale=engine.loss_scale,
        skipped_steps=engine.skipped_steps,
    )


def validate(engine: partita.Engine, held_out: Windows, count: int) -> float:
    """Mean loss over `count` held-out windows, in nats per byte; every rank takes its share of them."""
    ranks, rank, size = engine.world_size, engine.global_rank, engine.train_micro_batch_size_per_gpu()
    windows = held_out.spread(max(count, ranks))
    mine = windows[rank : len(windows) // ranks * ranks : ranks]  # as many on every rank
    total = 0.0
    for first in range(0, len(mine), size):
        batch = default_collate([held_out[i] for i in mine[first : first + size]])
        loss = engine.eval_batch([part.to(engine.device) for part in batch])
        total += loss.item() * len(batch[0])
    (total_of_ranks,) = sum_over_ranks(engine, total)
    return total_of_ranks / (len(mine) * ranks)


# -- what it learned


def generate(
    engine: partita.Engine, prompt: bytes, length: int, *, context: int, temperature: float, seed: int
) -> bytes:
    """The prompt and `length` bytes that the model thinks may follow.

    All ranks call it: the same seed draws the same bytes, and it works wherever the parameters are.
    """
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(length):
        window = torch.tensor([list(text[-context:])], device=engine.device)
        logits: Tensor = engine.eval_batch([window])[0, -1].float().cpu()
        text.append(int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)))
    return bytes(text)


def write_results(engine: partita.Engine, args: argparse.Namespace, rows: list[Row], sample: str) -> str:
    """Everything but the weights and metrics; returns a line that sums the run up."""
    description = {"architecture": args.model, "sizes": asdict(model_config(args))}
    (args.out / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    engine.save_config(args.out / "config.json")
    (args.out / "sample.txt").write_text(sample, encoding="utf-8")
    millions = sum(p.numel() for p in engine.module.parameters()) / 1e6
    ranks = "1 rank" if engine.world_size == 1 else f"{engine.world_size} ranks"
    stage = engine.config.zero_optimization.stage
    precision = "fp16" if engine.config.fp16.enabled else "bf16" if engine.config.bf16.enabled else "fp32"
    title = f"{args.model.upper()}, {millions:.2f} M parameters, {precision}, ZeRO stage {stage}, {ranks}"
    plot_losses(rows, title, args.out / "loss.png")
    last = rows[-1]
    tokens = engine.client_state["tokens"]
    return (
        f"{title}: {last.step} steps, {tokens / 1e6:.2f} M tokens; loss {last.loss:.3f}, "
        f"validation {last.val_loss:.3f} nats = {last.bits_per_byte:.3f} bits per byte; results in {args.out}"
    )


def batch_note(engine: partita.Engine) -> str:
    """What to say if the checkpoint's steps had another number of windows."""
    batch, before = engine.train_batch_size(), engine.client_state.get("batch", engine.train_batch_size())
    if batch == before:
        return ""
    return f"a step now has {batch} windows, before it had {before}: it is --batch-size x --accumulate x ranks"


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    corpus = load_corpus(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        file_to_write(args.out / name)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # unless the engine takes it: after the last step it ends nothing
    engine, batches = make_engine(args, corpus.train)
    if not say_where_it_begins(engine, args.steps, batch_note(engine)):
        engine.destroy()
        return False
    speaks = engine.global_rank == 0
    interrupts = Interrupts(saves=engine.config.checkpoint.dir is not None, speaks=speaks)
    goes_on_from = None if engine.resumed_from is None else engine.global_steps
    with MetricsFile(args.out / "metrics.csv" if speaks else None, goes_on_from=goes_on_from) as metrics:
        try:
            with Progress(args.steps, done=engine.global_steps, speaks=speaks) as progress:
                interrupted = train(engine, batches, corpus.held_out, args, metrics, progress, interrupts)
        except partita.Preempted:  # the engine has saved, and has said so
            engine.destroy()
            return interrupts.requested
        save_results(engine, args, metrics.rows, interrupted=interrupted)
    save_end(engine)
    engine.destroy()
    return interrupted


def save_results(engine: partita.Engine, args: argparse.Namespace, rows: list[Row], *, interrupted: bool) -> None:
    """Writes the files of --out but for the metrics, and prints the sample and a summary. All ranks call it."""
    engine.save_model(args.out / "model.safetensors")
    sample = generate(
        engine,
        args.prompt.encode(),
        args.sample_bytes,
        context=args.context,
        temperature=args.temperature,
        seed=args.seed,
    ).decode(errors="replace")
    if engine.global_rank == 0:
        summary = write_results(engine, args, rows, sample)
        print(f"\n{sample}\n\n{'interrupted; ' if interrupted else ''}{summary}", flush=True)


def job() -> bool:
    args = parse_arguments((__doc__ or "").split("\n\n")[0])
    with process_group(args.device):
        return run(args)


def main() -> int:
    return run_job("pretrain_lm.py", job)


if __name__ == "__main__":
    sys.exit(main())
