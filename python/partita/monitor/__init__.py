"""What a run reports about itself."""

from partita.monitor.progress import StepReport, StepReporter
from partita.monitor.records import StepWaits
from partita.monitor.timers import PhaseTimers
from partita.monitor.waits import Waits, WaitTable, gather_waits, step_waits

__all__ = ["PhaseTimers", "StepReport", "StepReporter", "StepWaits", "WaitTable", "Waits", "gather_waits", "step_waits"]
