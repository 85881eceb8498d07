"""Flat units: layout, storage, stage policies, and the reduction of their gradients."""

from partita.units.layout import ShardSlice, UnitLayout
from partita.units.policy import StagePolicy, stage_policy
from partita.units.reducer import GradientReducer, ReductionSettings
from partita.units.unit import GradState, Unit, build_units

__all__ = [
    "GradState",
    "GradientReducer",
    "ReductionSettings",
    "ShardSlice",
    "StagePolicy",
    "Unit",
    "UnitLayout",
    "build_units",
    "stage_policy",
]
