"""What a run reports about itself."""

from partita.monitor.build import require_libraries
from partita.monitor.monitor import Monitor
from partita.monitor.records import Record, StepReport, StepWaits
from partita.monitor.sink import Sink
from partita.monitor.timers import PhaseTimers
from partita.monitor.tokens import tokens_in
from partita.monitor.waits import Waits, WaitTable, gather_waits, step_waits

__all__ = [
    "Monitor",
    "PhaseTimers",
    "Record",
    "Sink",
    "StepReport",
    "StepWaits",
    "WaitTable",
    "Waits",
    "gather_waits",
    "require_libraries",
    "step_waits",
    "tokens_in",
]
