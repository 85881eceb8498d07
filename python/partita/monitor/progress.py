"""The lines that a run prints about its steps."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from partita.monitor.timers import PhaseTimers

logger = logging.getLogger("partita")


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like."""

    step: int
    lr: list[float]
    grad_norm: float  # of the mean gradient, before clipping
    loss_scale: float
    skipped_steps: int
    skipped: bool


class StepReporter:
    """On rank 0: a line every `steps_per_print` steps, and one for every skipped step."""

    def __init__(self, rank: int, steps_per_print: int, timers: PhaseTimers) -> None:
        self._silent = rank != 0
        self._steps_per_print = steps_per_print
        self._timers = timers
        self._last_time = time.perf_counter()

    def report(self, report: StepReport) -> None:
        """Called after every optimizer step."""
        if self._silent:
            return
        if report.skipped:
            logger.warning(
                "step %d skipped: the gradients are not finite (norm %g); loss scale now %g, skipped so far: %d",
                report.step,
                report.grad_norm,
                report.loss_scale,
                report.skipped_steps,
            )
        if self._steps_per_print and report.step % self._steps_per_print == 0:
            self._print(report)

    def _print(self, report: StepReport) -> None:
        now = time.perf_counter()
        ms = (now - self._last_time) * 1e3 / self._steps_per_print
        self._last_time = now
        phases = [f"{name} {total / self._steps_per_print:.1f}" for name, total in self._timers.take().items()]
        logger.info(
            "step %d  lr %s  grad norm %.4g  loss scale %g  skipped %d  %.1f ms/step%s",
            report.step,
            ",".join(f"{lr:.4g}" for lr in report.lr),
            report.grad_norm,
            report.loss_scale,
            report.skipped_steps,
            ms,
            f" ({', '.join(phases)} ms)" if phases else "",
        )
