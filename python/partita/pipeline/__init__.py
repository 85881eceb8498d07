"""Pipelines: schedules as data, proved and simulated without processes; models as layers in stages, and their steps."""

from partita.pipeline.chosen import placement, schedule_for
from partita.pipeline.classic import forward_wave
from partita.pipeline.draw import draw, timeline
from partita.pipeline.executor import Batches, PipelineError, PipelineStep, StagesHere
from partita.pipeline.families import NAMES, auto, by_name
from partita.pipeline.huggingface import decoder_layers, decoder_names
from partita.pipeline.layers import LayerSpec, TiedLayerSpec
from partita.pipeline.measure import LayerTimes, measure_layers
from partita.pipeline.module import PipelineModule
from partita.pipeline.outbox import Outbox
from partita.pipeline.partition import balanced
from partita.pipeline.payload import classes_of
from partita.pipeline.prove import Proof, prove
from partita.pipeline.rank_plan import RankPlan, pairs_of, plan_of, require_queues
from partita.pipeline.same_labels import fingerprint, require_same_labels
from partita.pipeline.schedule import Action, Schedule, ScheduleError
from partita.pipeline.shared import Tie
from partita.pipeline.simulate import Costs, Simulation, Span, simulate
from partita.pipeline.stage import Stage
from partita.pipeline.text import from_csv, from_text, to_csv, to_text
from partita.pipeline.tied import TiedWeights, share_values
from partita.pipeline.weight_split import WeightSplit

__all__ = [
    "NAMES",
    "Action",
    "Batches",
    "Costs",
    "LayerSpec",
    "LayerTimes",
    "Outbox",
    "PipelineError",
    "PipelineModule",
    "PipelineStep",
    "Proof",
    "RankPlan",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Span",
    "Stage",
    "StagesHere",
    "Tie",
    "TiedLayerSpec",
    "TiedWeights",
    "WeightSplit",
    "auto",
    "balanced",
    "by_name",
    "classes_of",
    "decoder_layers",
    "decoder_names",
    "draw",
    "fingerprint",
    "forward_wave",
    "from_csv",
    "from_text",
    "measure_layers",
    "pairs_of",
    "placement",
    "plan_of",
    "prove",
    "require_queues",
    "require_same_labels",
    "schedule_for",
    "share_values",
    "simulate",
    "timeline",
    "to_csv",
    "to_text",
]
