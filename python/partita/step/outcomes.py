"""What the host does about a step once it knows what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partita.comm import CommunicationError
from partita.monitor import Monitor, PhaseTimers, StepReport, step_waits
from partita.optim import PendingOutcome, StepOutcome
from partita.step.schedule import WatchedSchedule
from partita.step.skips import Finiteness, SkipGuard


@dataclass
class _Entry:
    step: int
    outcome: PendingOutcome
    finiteness: Finiteness
    is_known: bool = False


class StepOutcomes:
    """Moves the learning rate, reports the step, and ends a run that only skips, for one step at a time.

    On the CPU that happens at the end of the step. On a GPU the outcome arrives later; it is asked for at the beginning
    of the next update, when the GPU has a whole forward and backward to do, and the host waits for what is long done.

    Args:
        schedule: None: the learning rate stays.
        learning_rates: of each param group, as they are now.
        scales_loss: whether there is a loss scale to report.
        refuse_difference: raises on all ranks, as they took a step (whose number it gets) with different
            hyper-parameters. A collective.
    """

    def __init__(
        self,
        schedule: WatchedSchedule | None,
        learning_rates: Callable[[], list[float]],
        monitor: Monitor,
        timers: PhaseTimers,
        skips: SkipGuard,
        *,
        scales_loss: bool,
        refuse_difference: Callable[[int], None],
    ) -> None:
        self._schedule = schedule
        self._scales_loss = scales_loss
        self._learning_rates = learning_rates
        self._monitor = monitor
        self._timers = timers
        self._skips = skips
        self._refuse_difference = refuse_difference
        self._last: _Entry | None = None
        self.was_skipped = False  # the last step whose outcome is known

    def enter(self, step: int, outcome: PendingOutcome, finiteness: Finiteness) -> None:
        """A step has been queued; the one before it is settled."""
        self._last = _Entry(step, outcome, finiteness)

    def learn(self) -> None:
        """The learning rate moves and the step is reported, if that has not happened. Concerns this rank alone."""
        if self._last is None or self._last.is_known:
            return
        outcome, step = self._wait(self._last), self._last.step
        self._last.is_known = True
        control, state = outcome.control, outcome.loss_scale
        self.was_skipped = control.skip
        if self._schedule is not None and not control.skip:
            self._schedule.step()
        self._monitor.report(
            StepReport(
                step=step,
                loss=outcome.loss,
                lr=self._learning_rates(),
                grad_norm=control.grad_norm,
                loss_scale=state.scale if self._scales_loss else None,
                skipped_steps=state.skipped_steps,
                skipped=control.skip,
                waits=step_waits(outcome.waits),
                tokens=outcome.tokens or None,
                flops=outcome.flops or None,
                phases_ms=self._timers.take(),
            )
        )

    def forget(self) -> None:
        """Nothing is done about the last step any more."""
        self._last = None

    def close(self, *, waits: bool) -> None:
        """The last step is reported. There is no schedule any more.

        Args:
            waits: False: the step is reported only if its outcome is here. A GPU behind a failed collective may never
                come to it.
        """
        try:
            if waits or (self._last is not None and self._last.outcome.has_arrived):
                self.learn()
        finally:
            self._schedule = self._last = None

    def settle(self) -> None:
        """The last step is done with. All ranks call this at the same place of a step.

        Raises:
            FloatingPointError: the run skips its steps and does nothing else, see `SkipGuard`.
            RuntimeError: the ranks took the step with different hyper-parameters.
        """
        if self._last is not None and not self._wait(self._last).digests_agree:
            last, self._last = self._last, None
            self._refuse_difference(last.step)
        self.learn()
        if self._last is not None:
            last, self._last = self._last, None
            self._skips.check(last.step, last.outcome.wait().loss_scale, last.finiteness)

    def _wait(self, entry: _Entry) -> StepOutcome:
        try:
            return entry.outcome.wait()
        except CommunicationError:
            self._last = None  # nobody waits in vain a second time
            raise
