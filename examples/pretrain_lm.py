"""Pretrains a small byte-level language model with Partita, on one process or on many ranks.

    torchrun --nproc-per-node 2 examples/pretrain_lm.py
    python examples/pretrain_lm.py --text book.txt --stage 1 --precision bf16

Writes into --out: model.safetensors, model.json (its sizes), config.json (the engine's), metrics.csv, loss.png,
sample.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from models import GPT, LSTM, ModelConfig
from options import JobError, parse_arguments
from partita.files import file_to_write
from report import MetricsFile, Row, plot_losses
from text import Corpus, TextError, Windows, read_text, split, standard_library_text
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import default_collate
from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

MODELS = {"gpt": GPT, "lstm": LSTM}
BAR = "{percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
WARMUP = 0.05  # of all steps
FILES = ("model.safetensors", "model.json", "config.json", "metrics.csv", "loss.png", "sample.txt")
SPEAKER_SECONDS = 10.0  # that the other ranks give rank 0 to say what is wrong
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


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
    if args.precision != "fp32":
        config[args.precision] = {"enabled": True}
    return config if args.config is None else {**config, **read_json(args.config)}


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"cannot read the config {file}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"the config {file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise JobError(f"the config {file} holds a {type(value).__name__}, not an object")
    return value


def load_corpus(args: argparse.Namespace) -> Corpus:
    max_bytes = int(args.megabytes * 1e6)
    text = standard_library_text(max_bytes) if args.text is None else read_text(args.text, max_bytes)
    ranks = dist.get_world_size()
    return split(text, args.context, train_windows=args.batch_size * ranks, held_out_windows=ranks)


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(context=args.context, layers=args.layers, heads=args.heads, width=args.width)


def device_of_this_rank(kind: str) -> torch.device:
    """A GPU of its own for each rank of a host, or the CPU."""
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def make_engine(args: argparse.Namespace, train: Windows) -> tuple[partita.Engine, Iterator[Any]]:
    """The engine, and this rank's micro-batches without end."""
    torch.manual_seed(args.seed)
    model = MODELS[args.model](model_config(args)).to(device_of_this_rank(args.device))
    try:
        engine, _, loader, _ = partita.initialize(model, training_data=train, config=engine_config(args))
    except ValueError as error:  # a ConfigError, or what the config asks for does not fit the model or the data
        raise JobError(str(error)) from None
    assert loader is not None  # there is training data
    return engine, loader.repeat()


# -- training


class Interrupts:
    """Turns Ctrl-C into a flag, so that all ranks stop after the same step and still write their results."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, *_: object) -> None:
        self.requested = True


def train(
    engine: partita.Engine,
    batches: Iterator[Any],
    held_out: Windows,
    args: argparse.Namespace,
    metrics: MetricsFile,
    progress: Progress,
) -> bool:
    """Trains for `args.steps` steps and adds rows to `metrics`; True if Ctrl-C ended it earlier."""
    interrupts = Interrupts()
    step_tokens = engine.train_batch_size() * args.context
    metrics.add(measure(engine, val_loss=validate(engine, held_out, args.eval_windows)))
    total, first, started = torch.zeros((), device=engine.device), 0, time.perf_counter()
    for step in range(1, args.steps + 1):
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
        total_of_ranks, stop = sum_over_ranks(engine, total.item(), float(interrupts.requested))
        seconds, steps = time.perf_counter() - started, step - first
        loss_mean = total_of_ranks / (steps * engine.gradient_accumulation_steps() * engine.world_size)
        last = step == args.steps or stop > 0
        val_loss = validate(engine, held_out, args.eval_windows) if last or step % args.eval_every == 0 else None
        metrics.add(measure(engine, loss=loss_mean, val_loss=val_loss, tokens_per_s=steps * step_tokens / seconds))
        progress.show(metrics.rows)
        if stop:
            return True
        total, first, started = torch.zeros_like(total), step, time.perf_counter()
    return False


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


def sum_over_ranks(engine: partita.Engine, *values: float) -> list[float]:
    """A collective: all ranks call it with as many values."""
    total = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    return [float(value) for value in total]


class Progress:
    """On a terminal a bar, elsewhere (a log, a job's output) a plain line for each row of metrics."""

    def __init__(self, steps: int, *, speaks: bool) -> None:
        has_bar = speaks and sys.stderr.isatty()
        self._prints = speaks and not has_bar
        self._steps = steps
        self._bar = tqdm(total=steps, disable=not has_bar, dynamic_ncols=True, bar_format=BAR)
        self._logging = logging_redirect_tqdm([logging.getLogger("partita")]) if has_bar else contextlib.nullcontext()

    def __enter__(self) -> Progress:
        self._logging.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._logging.__exit__(*error)
        self._bar.close()

    def step(self) -> None:
        self._bar.update()

    def show(self, rows: list[Row]) -> None:
        row, held_out = rows[-1], [row.val_loss for row in rows if row.val_loss is not None]
        text = (
            f"loss {row.loss:.3f} val {held_out[-1]:.3f} {row.tokens_per_s:,.0f} tokens/s lr {row.lr:.2g} "
            f"norm {row.grad_norm:.2f} scale {row.loss_scale:g} skipped {row.skipped_steps}"
        )
        self._bar.set_postfix_str(text)
        if self._prints:
            print(f"step {row.step}/{self._steps} {text}", file=sys.stderr, flush=True)


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
    tokens = last.step * engine.train_batch_size() * args.context
    return (
        f"{title}: {last.step} steps, {tokens / 1e6:.2f} M tokens; loss {last.loss:.3f}, "
        f"validation {last.val_loss:.3f} nats = {last.bits_per_byte:.3f} bits per byte; results in {args.out}"
    )


def run(args: argparse.Namespace) -> bool:
    """The whole job; True if Ctrl-C cut it short."""
    corpus = load_corpus(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        file_to_write(args.out / name)
    engine, batches = make_engine(args, corpus.train)
    speaks = engine.global_rank == 0
    with MetricsFile(args.out / "metrics.csv" if speaks else None) as metrics:
        with Progress(args.steps, speaks=speaks) as progress:
            interrupted = train(engine, batches, corpus.held_out, args, metrics, progress)
        engine.save_model(args.out / "model.safetensors")
        sample = generate(
            engine,
            args.prompt.encode(),
            args.sample_bytes,
            context=args.context,
            temperature=args.temperature,
            seed=args.seed,
        ).decode(errors="replace")
        if speaks:
            summary = write_results(engine, args, metrics.rows, sample)
            print(f"\n{sample}\n\n{'interrupted; ' if interrupted else ''}{summary}", flush=True)
    engine.destroy()
    return interrupted


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    partita.init_distributed("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@record
def job() -> bool:
    """What torchrun reports the errors of, at the end of its output; True if Ctrl-C cut it short."""
    args = parse_arguments((__doc__ or "").split("\n\n")[0])
    try:
        with process_group(args.device):
            return run(args)
    except TextError as error:
        raise JobError(str(error)) from None
    except OSError as error:
        what = f"{error.filename or args.out}: {error.strerror}" if error.strerror else str(error)
        raise JobError(f"cannot write {what}") from None
    except FloatingPointError as error:  # the engine gave up: no step has finite gradients
        raise JobError(str(error), code=1) from None
    except KeyboardInterrupt:
        return True


def main() -> int:
    try:
        return INTERRUPTED if job() else 0
    except JobError as failure:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"pretrain_lm.py: error: {failure}", file=sys.stderr, flush=True)
        else:
            time.sleep(SPEAKER_SECONDS)  # torchrun ends all ranks when the first one exits, and rank 0 may be slower
        return failure.code


if __name__ == "__main__":
    sys.exit(main())
