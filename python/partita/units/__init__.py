"""Flat units: layout, storage, stage policies, and the reduction of their gradients."""

from partita.units.gathers import ParameterGathers
from partita.units.layout import ShardSlice, UnitLayout
from partita.units.policy import StagePolicy, stage_policy
from partita.units.reducer import BackwardPlan, GradientReducer, ReductionSettings, has_reducer
from partita.units.unit import GradState, Unit, build_units, require_on

__all__ = [
    "BackwardPlan",
    "GradState",
    "GradientReducer",
    "ParameterGathers",
    "ReductionSettings",
    "ShardSlice",
    "StagePolicy",
    "Unit",
    "UnitLayout",
    "build_units",
    "has_reducer",
    "require_on",
    "stage_policy",
]
