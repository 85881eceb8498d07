"""Pipelines: schedules as data, proved and simulated without processes."""

from partita.pipeline.draw import draw, timeline
from partita.pipeline.families import NAMES, auto, by_name
from partita.pipeline.partition import balanced
from partita.pipeline.prove import Proof, prove
from partita.pipeline.schedule import Action, Schedule, ScheduleError
from partita.pipeline.simulate import Costs, Simulation, Span, simulate
from partita.pipeline.text import from_csv, from_text, to_csv, to_text

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Proof",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Span",
    "auto",
    "balanced",
    "by_name",
    "draw",
    "from_csv",
    "from_text",
    "prove",
    "simulate",
    "timeline",
    "to_csv",
    "to_text",
]
