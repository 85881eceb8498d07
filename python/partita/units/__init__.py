"""Flat units: layout, storage, stage policies, lifetimes of parameters, and the reduction of their gradients."""

from partita.units.absent import DESCRIBING, AbsentParameterError, Holder, give_to, holder_of, take_back
from partita.units.blocks import find_blocks
from partita.units.build import (
    ModelUnits,
    NamedParameter,
    ParameterGroup,
    UnitSettings,
    build_units,
    lifetime_of,
    require_on,
)
from partita.units.gathers import ParameterGathers
from partita.units.layout import ParameterInfo, ShardSlice, Slot, UnitLayout, make_layout
from partita.units.lifetimes import ParameterLifetimes
from partita.units.parameters import FlatParameters, Lifetime, Offload, fill_from_rank_0, full_values
from partita.units.policy import StagePolicy, stage_policy
from partita.units.reducer import BackwardListener, BackwardPlan, GradientReducer, ReductionSettings, has_reducer
from partita.units.unit import GradState, Unit

__all__ = [
    "DESCRIBING",
    "AbsentParameterError",
    "BackwardListener",
    "BackwardPlan",
    "FlatParameters",
    "GradState",
    "GradientReducer",
    "Holder",
    "Lifetime",
    "ModelUnits",
    "NamedParameter",
    "Offload",
    "ParameterGathers",
    "ParameterGroup",
    "ParameterInfo",
    "ParameterLifetimes",
    "ReductionSettings",
    "ShardSlice",
    "Slot",
    "StagePolicy",
    "Unit",
    "UnitLayout",
    "UnitSettings",
    "build_units",
    "fill_from_rank_0",
    "find_blocks",
    "full_values",
    "give_to",
    "has_reducer",
    "holder_of",
    "lifetime_of",
    "make_layout",
    "require_on",
    "stage_policy",
    "take_back",
]
