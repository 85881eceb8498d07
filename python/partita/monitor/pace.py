"""How fast steps go: means over the steps since the last look."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from partita.monitor.records import StepReport


@dataclass(frozen=True)
class Means:
    """Of some steps. What is not known is None.

    phases_ms: of those whose times were known by then.
    slowest_rank: who was the slowest in most of them.
    """

    seconds: float  # of a step
    samples_per_s: float
    tokens_per_s: float | None
    flops_per_s: float | None
    phases_ms: Mapping[str, float]
    waited_share: float | None
    slowest_rank: int | None


class Pace:
    """Adds steps up until somebody looks.

    Args:
        samples: in a step, over all ranks.
        clock: seconds.
    """

    def __init__(self, samples: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._samples = samples
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """The time until now is that of no step."""
        self._since_s = self._clock()
        self._steps = self._tokens = 0
        self._flops = 0.0
        self._phases_ms: dict[str, float] = {}
        self._timed_steps = 0  # that have phases
        self._waited: list[float] = []
        self._slowest: Counter[int] = Counter()

    def add(self, report: StepReport) -> None:
        """One more step."""
        self._steps += 1
        self._tokens += report.tokens or 0
        self._flops += report.flops or 0.0
        self._timed_steps += len(report.phases_ms)
        for phases in report.phases_ms:
            for name, ms in phases.items():
                self._phases_ms[name] = self._phases_ms.get(name, 0.0) + ms
        if report.waits is not None:
            self._waited.append(report.waits.waited_share)
            if report.waits.slowest_rank is not None:
                self._slowest[report.waits.slowest_rank] += 1

    @property
    def elapsed_s(self) -> float:
        """Since the last look."""
        return self._clock() - self._since_s

    def take(self) -> Means:
        """The means of the steps since the last look; there has been one."""
        elapsed_s, steps = max(self.elapsed_s, 1e-9), self._steps
        means = Means(
            seconds=elapsed_s / steps,
            samples_per_s=self._samples * steps / elapsed_s,
            tokens_per_s=self._tokens / elapsed_s if self._tokens else None,
            flops_per_s=self._flops / elapsed_s if self._flops else None,
            phases_ms={name: ms / self._timed_steps for name, ms in self._phases_ms.items()},
            waited_share=sum(self._waited) / len(self._waited) if self._waited else None,
            slowest_rank=self._slowest.most_common(1)[0][0] if self._slowest else None,
        )
        self.restart()
        return means
