"""What a run tells of its steps, to people and to sinks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import SupportsFloat

from torch import Tensor

from partita.comm import raise_together
from partita.monitor.build import make_sinks
from partita.monitor.machine import memory_bytes, peak_flops_of
from partita.monitor.pace import Means, Pace
from partita.monitor.progress import OddSteps, Progress
from partita.monitor.records import Record, StepReport
from partita.monitor.writer import RecordWriter
from partita.run import Run

_TAKEN = ("step", "samples", "time")  # what every row has


class Monitor:
    """Reports of steps on their way to lines and sinks. On ranks other than 0 it does nothing.

    Args:
        exits: writes what is left.

    Raises:
        ConfigError, ValueError: a sink cannot begin; on all ranks.
    """

    def __init__(self, run: Run, exits: ExitStack) -> None:
        self._run = run
        self._is_first = run.is_first
        self._interval = run.config.monitor.interval_steps
        self._peak_flops = _peak_flops(run)
        self._odd = OddSteps()
        self._progress = Progress(run.config, run.batch.train, self._peak_flops) if run.is_first else None
        self._writer: RecordWriter | None = None
        self._begin = (0, 0)  # step and samples that the run goes on from
        self._has_begun = False  # for the sinks
        self._pace: Pace | None = None  # from the first record on
        if run.config.records_steps:
            self._open_sinks(exits)
        if self._progress is not None:
            exits.callback(self._progress.close)

    def _open_sinks(self, exits: ExitStack) -> None:
        error: Exception | None = None
        if self._is_first:
            try:
                self._writer = RecordWriter(make_sinks(self._run.config))
                exits.callback(self._writer.close)
            except ValueError as failure:
                error = failure
        raise_together(self._run.grid.world, error)

    @property
    def times_phases(self) -> bool:
        """Whether somebody wants to know how long the phases of a step take."""
        wanted = self._progress is not None and not self._progress.is_silent
        return self._run.config.wall_clock_breakdown and (wanted or self._writer is not None)

    def report(self, report: StepReport) -> None:
        """A step is known. Steps come in their order."""
        if self._progress is None:
            return
        self._odd.report(report)
        self._progress.report(report)
        if self._writer is None:
            return
        if self._pace is not None:
            self._pace.add(report)
        if report.step % self._interval == 0:
            means = None if self._pace is None else self._pace.take()
            self._pace = self._pace or Pace(self._run.batch.train)
            self._put(report.step, self._values(report, means), is_own=True)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Values of the program.

        Raises:
            TypeError, ValueError: a name or a value cannot be recorded; names it. On all ranks that give it.
        """
        for name, value in values.items():
            _check(name, value)
        if self._writer is not None and values:
            numbers = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in values.items()}
            self._put(step, numbers, is_own=False)

    def go_on_from(self, step: int, samples: int) -> None:
        """The run is at this step now: a checkpoint was loaded."""
        self._begin = (step, samples)
        self._has_begun = False
        self._pace = None

    def _put(self, step: int, values: Mapping[str, float], *, is_own: bool) -> None:
        assert self._writer is not None
        # A program may go back only to evaluate and log(): then later steps stay recorded.
        if not self._has_begun and (is_own or not self._begin[0]):
            self._has_begun = True
            self._writer.go_on_from(*self._begin)
        samples = self._begin[1] + (step - self._begin[0]) * self._run.batch.train
        self._writer.put(Record(step, samples, values, is_own, time.time()))

    def _values(self, report: StepReport, means: Means | None) -> dict[str, float]:
        values: dict[str, float | None] = {"loss": report.loss}
        values |= {f"lr_{i}" if i else "lr": lr for i, lr in enumerate(report.lr)}
        values |= {
            "grad_norm": report.grad_norm,
            "loss_scale": report.loss_scale,
            "skipped_steps": report.skipped_steps,
            **memory_bytes(self._run.device),
        }
        if means is not None:
            values |= self._values_of_means(means)
        return {name: value for name, value in values.items() if value is not None}

    def _values_of_means(self, means: Means) -> dict[str, float | None]:
        values: dict[str, float | None] = {
            "step_ms": means.seconds * 1e3,
            "samples_per_s": means.samples_per_s,
            "tokens_per_s": means.tokens_per_s,
            "waited_share": means.waited_share,
            "slowest_rank": means.slowest_rank,
            "flops_per_s": means.flops_per_s,
        }
        if means.flops_per_s is not None and self._peak_flops is not None:
            values["mfu"] = means.flops_per_s / self._peak_flops
        return values | {f"{'update' if name == 'step' else name}_ms": ms for name, ms in means.phases_ms.items()}


def _peak_flops(run: Run) -> float | None:
    """Of all devices of the job together."""
    tflops = run.config.monitor.peak_tflops
    peak = None if tflops is None else tflops * 1e12
    if peak is None and run.precision.is_half:
        peak = peak_flops_of(run.streams.name)
    return None if peak is None else peak * run.world_size


def _check(name: str, value: SupportsFloat) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"log(): {name!r} is no name: give a text that is not empty")
    if name in _TAKEN:
        raise ValueError(f"log(): '{name}' is what every row has: give the value another name")
    if not _is_number(value):
        raise TypeError(f"log(): the value of '{name}' is a {type(value).__name__}: give one number")


def _is_number(value: object) -> bool:
    """Alike on all ranks, also those that write nothing. No tensor is waited for."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    if not isinstance(value, SupportsFloat):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
