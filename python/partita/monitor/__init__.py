"""What a run reports about itself."""

from partita.monitor.build import make_sinks, require_libraries
from partita.monitor.comms_log import CommsRow
from partita.monitor.history import RunHistory, Series, read_run
from partita.monitor.module_table import ModuleCosts, ProfiledStep, inclusive, scaled, summary_text, tree_text
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
    "ModuleCosts",
    "Monitor",
    "Panel",
    "PhaseTimers",
    "ProfiledStep",
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
    "inclusive",
    "make_sinks",
    "panels_of",
    "read_run",
    "require_libraries",
    "scaled",
    "step_waits",
    "summary_text",
    "tokens_in",
    "tree_text",
]
