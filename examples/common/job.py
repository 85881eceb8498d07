"""What every job does around its training: ranks, errors in one line, where it begins, what is saved at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
from partita.checkpoint import CheckpointError
from partita.config import ConfigError, read_object
from torch.distributed.elastic.multiprocessing.errors import record

SPEAKER_SECONDS = 10.0  # that the other ranks give rank 0 to say what is wrong
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
FAILED, MISUSED = 1, 2  # exit codes: the run broke, or the user asked for what cannot be


class JobError(Exception):
    """Ends the program; the message is one line that says what to do.

    Attributes:
        code: the exit status.
    """

    def __init__(self, message: str, code: int = MISUSED) -> None:
        super().__init__(" ".join(message.split()), code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


def run_job(name: str, job: Callable[[], bool]) -> int:
    """Runs a job on this rank, and says in one line what went wrong; returns the exit status of the program.

    Args:
        name: of the program, for the error.
        job: the work of a rank; returns True if Ctrl-C cut it short.
    """
    try:
        return INTERRUPTED if record(_in_one_line)(job) else 0
    except JobError as failure:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: error: {failure}", file=sys.stderr, flush=True)
        else:
            time.sleep(SPEAKER_SECONDS)  # torchrun ends all ranks when the first one exits, and rank 0 may be slower
        return failure.code


def run_on_ranks(name: str, parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], bool]) -> int:
    """`run_job()` of a program whose ranks train together on --device.

    Args:
        parse: reads the command line.
        run: the work of a rank; returns True if Ctrl-C cut it short.
    """

    def job() -> bool:
        args = parse()
        with process_group(getattr(args, "device", "cpu")):
            return run(args)

    return run_job(name, job)


def _in_one_line(job: Callable[[], bool]) -> bool:
    try:
        return job()
    except ConfigError as error:
        raise JobError(str(error)) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise JobError(f"cannot read or write {what}") from None
    except (CheckpointError, partita.CommunicationError, FloatingPointError) as error:
        # A checkpoint is damaged, of another run or not written; a rank is gone; no step has finite gradients.
        raise JobError(str(error), FAILED) from None
    except KeyboardInterrupt:
        return True


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """The ranks of the job, for the block; `device` is "cpu" or "cuda"."""
    partita.init_distributed("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of_this_rank(kind: str) -> torch.device:
    """A GPU of its own for each rank of a host, or the CPU."""
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def config_from(file: Path | None) -> dict[str, Any]:
    """The keys of a config file: JSON with comments, or YAML; none where there is no file."""
    return {} if file is None else read_object(file)


def sum_over_ranks(engine: partita.Engine, *values: float) -> list[float]:
    """A collective: all ranks call it with as many values."""
    total = torch.tensor(values, dtype=torch.float64, device=engine.device)
    try:
        dist.all_reduce(total)
    except RuntimeError as error:  # torch's, as the engine's would be a CommunicationError
        raise JobError(f"another rank has ended: {str(error).splitlines()[0]}", FAILED) from None
    return [float(value) for value in total]


def say_where_it_begins(engine: partita.Engine, steps: int, note: str = "") -> bool:
    """One line on rank 0 if the run goes on from a checkpoint; False if nothing is left to do of `steps`."""
    if engine.resumed_from is None:
        return True
    is_left, step = engine.global_steps < steps, engine.global_steps
    if is_left:
        text = f"goes on from {engine.resumed_from}, step {step} of {steps}" + (note and f"; {note}")
    else:
        text = (
            f"complete already: {engine.resumed_from} is at step {step} of {steps}; give more --steps to go on, "
            "or another folder with --checkpoints DIR to begin anew"
        )
    if engine.global_rank == 0:
        print(text, file=sys.stderr if is_left else sys.stdout, flush=True)
    return is_left


def save_end(engine: partita.Engine) -> None:
    """Saves the last step, unless its turn to be saved has come anyway."""
    settings = engine.config.checkpoint
    if settings.dir is not None and not (
        settings.interval_steps and engine.global_steps % settings.interval_steps == 0
    ):
        engine.save_checkpoint(settings.dir, client_state=engine.client_state)
