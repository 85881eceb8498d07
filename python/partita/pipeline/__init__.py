"""Pipelines: schedules as data, proved and simulated without processes; models as layers in stages."""

from partita.pipeline.draw import draw, timeline
from partita.pipeline.families import NAMES, auto, by_name
from partita.pipeline.layers import LayerSpec, TiedLayerSpec
from partita.pipeline.module import PipelineModule
from partita.pipeline.partition import balanced
from partita.pipeline.prove import Proof, prove
from partita.pipeline.schedule import Action, Schedule, ScheduleError
from partita.pipeline.shared import Tie
from partita.pipeline.simulate import Costs, Simulation, Span, simulate
from partita.pipeline.stage import Stage
from partita.pipeline.text import from_csv, from_text, to_csv, to_text

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "LayerSpec",
    "PipelineModule",
    "Proof",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Span",
    "Stage",
    "Tie",
    "TiedLayerSpec",
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
