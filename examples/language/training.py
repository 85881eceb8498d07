"""The training loop of pretrain_lm.py: steps, validations, rows of metrics."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import partita
import torch
from common.job import FAILED, JobError, save_end, say_where_it_begins, sum_over_ranks
from common.report import MetricsFile, Row, read_rows
from common.terminal import Interrupts, Progress
from partita.checkpoint import CheckpointError
from torch.utils.data import Dataset, default_collate

from language.text import Windows


@dataclass(frozen=True)
class Phase:
    """One training in the job.

    name: what the progress lines begin with; "" for nothing.
    steps: optimizer steps.
    log_every, eval_every: steps between two rows of metrics, and between two validations.
    step_tokens: what a step reads, over all ranks.
    bytes_per_token: of what `validate` reads; None: the loss is not one of a language model.
    validate: the loss on what is held out; all ranks call it.
    """

    name: str
    steps: int
    log_every: int
    eval_every: int
    step_tokens: int
    bytes_per_token: float | None
    validate: Callable[[partita.Engine], float]


def make_engine(
    model: torch.nn.Module, data: Dataset[Any], config: dict[str, Any]
) -> tuple[partita.Engine, Iterator[Any]]:
    """The engine, and this rank's micro-batches without end."""
    try:
        engine, _, loader, _ = partita.initialize(model, training_data=data, config=config)
    except CheckpointError as error:  # the folder, or what is in it, is not for this run
        raise JobError(f"{error} (--checkpoints DIR takes another folder)", FAILED) from None
    except ValueError as error:  # a ConfigError, or what the config asks for does not fit the model or the data
        raise JobError(str(error)) from None
    assert loader is not None  # there is training data
    return engine, loader.repeat()


def train_phase(
    engine: partita.Engine, batches: Iterator[Any], phase: Phase, table: Path, interrupts: Interrupts
) -> tuple[list[Row], bool]:
    """Trains up to the last step of a phase; goes on where the engine's checkpoint was.

    Args:
        table: the file of the metrics, which rank 0 writes.

    Returns:
        The rows of metrics, and whether Ctrl-C ended the phase earlier.

    Raises:
        partita.Preempted: the engine was asked to end, and has saved.
    """
    speaks = engine.global_rank == 0
    goes_on_from = None if engine.resumed_from is None else engine.global_steps
    if not say_where_it_begins(engine, phase.steps, batch_note(engine)):
        rows = read_rows(table, engine.global_steps) if speaks else []
        val_loss = phase.validate(engine)
        if not rows or rows[-1].val_loss is None:
            rows.append(measure(engine, phase, val_loss=val_loss))
        return rows, False
    if interrupts.requested:  # before this engine listened
        signal.raise_signal(signal.SIGUSR1)
    with (
        MetricsFile(table if speaks else None, goes_on_from=goes_on_from) as metrics,
        Progress(phase.steps, done=engine.global_steps, speaks=speaks, name=phase.name) as progress,
    ):
        try:
            interrupted = _train(engine, batches, phase, metrics, progress, interrupts)
        except partita.Preempted:
            engine.destroy()
            raise
    save_end(engine)
    return metrics.rows, interrupted


def _train(
    engine: partita.Engine,
    batches: Iterator[Any],
    phase: Phase,
    metrics: MetricsFile,
    progress: Progress,
    interrupts: Interrupts,
) -> bool:
    """True if Ctrl-C ended it before the last step."""
    first = engine.global_steps
    if first == 0:
        add_row(engine, metrics, measure(engine, phase, val_loss=phase.validate(engine)))
    total, started = torch.zeros((), device=engine.device), time.perf_counter()
    for step in range(first + 1, phase.steps + 1):
        count_tokens(engine, phase.step_tokens)
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(*(part.to(engine.device, non_blocking=True) for part in next(batches)))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        progress.step()
        if step % phase.log_every and step % phase.eval_every and step != phase.steps:
            continue
        # Only here does the host look at numbers: in between, an accelerator would run on without waiting.
        total_of_ranks, stop = sum_over_ranks(engine, total.item(), float(interrupts.ends_loop))
        seconds, steps = time.perf_counter() - started, step - first
        mean = total_of_ranks / (steps * engine.gradient_accumulation_steps() * engine.world_size)
        validates = step == phase.steps or stop > 0 or step % phase.eval_every == 0
        val_loss = phase.validate(engine) if validates else None
        speed = steps * phase.step_tokens / seconds
        add_row(engine, metrics, measure(engine, phase, loss=mean, val_loss=val_loss, tokens_per_s=speed))
        progress.show(step, in_a_line(metrics.rows))
        if stop:
            return True
        total, first, started = torch.zeros_like(total), step, time.perf_counter()
    return False


def add_row(engine: partita.Engine, metrics: MetricsFile, row: Row) -> None:
    """Into the table, and what the engine does not know by itself into the files of its monitor."""
    metrics.add(row)
    known = {"val_loss": row.val_loss, "bits_per_byte": row.bits_per_byte}
    if values := {name: value for name, value in known.items() if value is not None}:
        engine.log(values)


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


def batch_note(engine: partita.Engine) -> str:
    """What to say if the checkpoint's steps had another number of windows."""
    batch, before = engine.train_batch_size(), engine.client_state.get("batch", engine.train_batch_size())
    if batch == before:
        return ""
    return f"a step now has {batch} windows, before it had {before}: it is --batch-size x --accumulate x ranks"


def measure(
    engine: partita.Engine,
    phase: Phase,
    *,
    val_loss: float | None,
    loss: float | None = None,
    tokens_per_s: float | None = None,
) -> Row:
    has_bits = val_loss is not None and phase.bytes_per_token is not None
    return Row(
        step=engine.global_steps,
        loss=loss,
        val_loss=val_loss,
        bits_per_byte=bits_per_byte(val_loss, phase.bytes_per_token) if has_bits else None,
        tokens_per_s=tokens_per_s,
        lr=engine.get_lr()[0],
        grad_norm=engine.get_global_grad_norm(),
        loss_scale=engine.loss_scale,
        skipped_steps=engine.skipped_steps,
    )


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / bytes_per_token / math.log(2)


def held_out_samples(held_out: Windows, count: int, ranks: int) -> list[int]:
    """The windows of a validation: about `count`, and a multiple of the number of ranks."""
    samples = held_out.spread(max(count, ranks))
    return samples[: len(samples) // ranks * ranks]


def held_out_loss(engine: partita.Engine, held_out: Windows, samples: list[int]) -> float:
    """Mean loss over held-out windows, in nats per token; every rank takes its share of them."""
    ranks, size = engine.world_size, engine.train_micro_batch_size_per_gpu()
    mine = samples[engine.global_rank :: ranks]  # as many on every rank
    total = 0.0
    for first in range(0, len(mine), size):
        batch = default_collate([held_out[i] for i in mine[first : first + size]])
        loss = engine.eval_batch([part.to(engine.device) for part in batch])
        total += loss.item() * len(batch[0])
    (total_of_ranks,) = sum_over_ranks(engine, total)
    return total_of_ranks / len(samples)
