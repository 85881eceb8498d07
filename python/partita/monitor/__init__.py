"""What a run reports about itself."""

from partita.monitor.progress import StepReport, StepReporter
from partita.monitor.records import StepWaits
from partita.monitor.timers import PhaseTimers

__all__ = ["PhaseTimers", "StepReport", "StepReporter", "StepWaits"]
