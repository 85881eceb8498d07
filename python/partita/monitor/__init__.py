"""What a run reports about itself."""

from partita.monitor.build import require_libraries
from partita.monitor.comms_log import CommsRow
from partita.monitor.history import RunHistory, Series, read_run
from partita.monitor.monitor import Monitor
from partita.monitor.panels import Curve, Panel, by_samples, panels_of
from partita.monitor.records import Record, StepReport, StepWaits
from partita.monitor.sink import Sink
from partita.monitor.timers import PhaseTimers
from partita.monitor.tokens import tokens_in
from partita.monitor.waits import Waits, WaitTable, gather_waits, step_waits
from partita.monitor.watching import Watching

__all__ = [
    "CommsRow",
    "Curve",
    "Monitor",
    "Panel",
    "PhaseTimers",
    "Record",
    "RunHistory",
    "Series",
    "Sink",
    "StepReport",
    "StepWaits",
    "WaitTable",
    "Waits",
    "Watching",
    "by_samples",
    "gather_waits",
    "panels_of",
    "read_run",
    "require_libraries",
    "step_waits",
    "tokens_in",
]
