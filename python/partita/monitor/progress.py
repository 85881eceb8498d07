"""The lines that a run prints about its steps."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from partita.monitor.pace import Means, Pace
from partita.monitor.records import StepReport
from partita.run import ConsoleHandler

if TYPE_CHECKING:
    from partita.config import Config

logger = logging.getLogger("partita")

ALL_UP_TO, THEN_EVERY = 5, 10
REDRAW_S = 0.2  # the least time between two looks of the line that is rewritten
WORTH_TELLING = 0.01  # of the time, that ranks wait


class Progress:
    """On rank 0: a line every `steps_per_print` steps, or one that is rewritten.

    Args:
        samples: in a step, over all ranks.
        peak_flops: operations per second of all devices together; None: not known.
    """

    def __init__(self, config: Config, samples: int, peak_flops: float | None) -> None:
        way = config.monitor.progress
        console = next((handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)), None)
        is_chosen = way == "line" or (way == "auto" and "steps_per_print" not in config.model_fields_set)
        self._console = console if is_chosen else None
        self._every = 0 if way == "off" else config.steps_per_print or 0
        self._pace = Pace(samples)
        self._peak_flops = peak_flops

    @property
    def is_silent(self) -> bool:
        """Whether nothing is ever printed."""
        return not self._every and self._console is None

    def report(self, report: StepReport) -> None:
        """Called after every optimizer step."""
        if self.is_silent:
            return
        self._pace.add(report)
        if self._console is not None and self._console.can_show:
            if self._pace.elapsed_s >= REDRAW_S:
                self._console.show(self._text(report, self._pace.take()))
        elif self._every and report.step % self._every == 0:
            logger.info(self._text(report, self._pace.take()))

    def close(self) -> None:
        """The line that is rewritten stays as it is."""
        if self._console is not None:
            self._console.end_line()

    def _text(self, report: StepReport, means: Means) -> str:
        phases = ", ".join(f"{name} {ms:.1f}" for name, ms in means.phases_ms.items())
        items = [
            f"step {report.step}",
            None if report.loss is None else f"loss {report.loss:.4f}",
            f"lr {','.join(f'{lr:.4g}' for lr in report.lr)}",
            f"grad norm {report.grad_norm:.4g}",
            None if report.loss_scale is None else f"loss scale {report.loss_scale:g}",
            f"skipped {report.skipped_steps}",
            f"{means.seconds * 1e3:.1f} ms/step" + (f" ({phases} ms)" if phases else ""),
            f"{_rate(means.samples_per_s)} samples/s",
            None if means.tokens_per_s is None else f"{_rate(means.tokens_per_s)} tokens/s",
            self._mfu(means),
            _waits(means),
        ]
        return "  ".join(item for item in items if item is not None)

    def _mfu(self, means: Means) -> str | None:
        if means.flops_per_s is None or self._peak_flops is None:
            return None
        return f"MFU {means.flops_per_s / self._peak_flops:.1%}"


class OddSteps:
    """On rank 0: lines about steps that are not as they should be: the first five, and then every tenth."""

    def __init__(self) -> None:
        self._odd_losses = 0

    def report(self, report: StepReport) -> None:
        """Called after every optimizer step."""
        if report.skipped:
            self._tell_skip(report)
        elif report.loss is not None and not math.isfinite(report.loss):
            self._odd_losses += 1
            _tell(
                self._odd_losses,
                f"step {report.step}: the loss is {report.loss:g} although all gradients are finite, so the weights "
                "were updated: look at how the loss is computed (log of 0? an overflow in 16 bits?)",
            )

    def _tell_skip(self, report: StepReport) -> None:
        scale = "" if report.loss_scale is None else f"loss scale now {report.loss_scale:g}, "
        _tell(
            report.skipped_steps,
            f"step {report.step} skipped: the gradients are not finite (norm {report.grad_norm:g}); "
            f"{scale}skipped so far: {report.skipped_steps}",
        )


def _waits(means: Means) -> str | None:
    if means.waited_share is None or means.waited_share < WORTH_TELLING:
        return None
    whom = "" if means.slowest_rank is None else f" for rank {means.slowest_rank}"
    return f"waited{whom} {means.waited_share:.0%}"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _tell(count: int, text: str) -> None:
    """Warns, unless too many such lines have been written; `count` of them with this one."""
    if count <= ALL_UP_TO or count % THEN_EVERY == 0:
        logger.warning(text + ("; from here on every tenth is told" if count == ALL_UP_TO else ""))
