"""The lines that a run prints about its steps."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from partita.monitor.records import StepWaits
from partita.monitor.timers import PhaseTimers

logger = logging.getLogger("partita")

ALL_UP_TO, THEN_EVERY = 5, 10


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like."""

    step: int
    loss: float | None  # mean over micro-batches and ranks; None: no loss went through engine.backward()
    lr: list[float]
    grad_norm: float  # of the mean gradient, before clipping
    loss_scale: float | None  # None: losses are not scaled
    skipped_steps: int
    skipped: bool
    waits: StepWaits | None = None  # None: not known


class StepReporter:
    """On rank 0: a line every `steps_per_print` steps, and lines about steps that are not as they should be.

    Of such steps the first five have a line, and then every tenth.

    Args:
        samples: in a step, over all ranks.
    """

    def __init__(self, rank: int, steps_per_print: int, samples: int, timers: PhaseTimers) -> None:
        self._silent = rank != 0
        self._steps_per_print = steps_per_print
        self._samples = samples
        self._timers = timers
        self._last_time = time.perf_counter()
        self._odd_losses = 0

    def report(self, report: StepReport) -> None:
        """Called after every optimizer step."""
        if self._silent:
            return
        if report.skipped:
            self._tell_skip(report)
        elif report.loss is not None and not math.isfinite(report.loss):
            self._odd_losses += 1
            _tell(
                self._odd_losses,
                f"step {report.step}: the loss is {report.loss:g} although all gradients are finite, so the weights "
                "were updated: look at how the loss is computed (log of 0? an overflow in 16 bits?)",
            )
        if self._steps_per_print and report.step % self._steps_per_print == 0:
            self._print(report)

    def _tell_skip(self, report: StepReport) -> None:
        scale = "" if report.loss_scale is None else f"loss scale now {report.loss_scale:g}, "
        _tell(
            report.skipped_steps,
            f"step {report.step} skipped: the gradients are not finite (norm {report.grad_norm:g}); "
            f"{scale}skipped so far: {report.skipped_steps}",
        )

    def _print(self, report: StepReport) -> None:
        now = time.perf_counter()
        seconds = (now - self._last_time) / self._steps_per_print
        self._last_time = now
        rate = self._samples / seconds
        phases = [f"{name} {total / self._steps_per_print:.1f}" for name, total in self._timers.take().items()]
        items = [
            f"step {report.step}",
            None if report.loss is None else f"loss {report.loss:.4f}",
            f"lr {','.join(f'{lr:.4g}' for lr in report.lr)}",
            f"grad norm {report.grad_norm:.4g}",
            None if report.loss_scale is None else f"loss scale {report.loss_scale:g}",
            f"skipped {report.skipped_steps}",
            f"{seconds * 1e3:.1f} ms/step" + (f" ({', '.join(phases)} ms)" if phases else ""),
            f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s",
        ]
        logger.info("  ".join(item for item in items if item is not None))


def _tell(count: int, text: str) -> None:
    """Warns, unless too many such lines have been written; `count` of them with this one."""
    if count <= ALL_UP_TO or count % THEN_EVERY == 0:
        logger.warning(text + ("; from here on every tenth is told" if count == ALL_UP_TO else ""))
