"""What a run reports about itself."""

from partita.monitor.build import require_libraries
from partita.monitor.monitor import Monitor
from partita.monitor.records import Record, StepReport, StepWaits
from partita.monitor.sink import Sink
from partita.monitor.timers import PhaseTimers
from partita.monitor.tokens import tokens_in

__all__ = [
    "Monitor",
    "PhaseTimers",
    "Record",
    "Sink",
    "StepReport",
    "StepWaits",
    "require_libraries",
    "tokens_in",
]
