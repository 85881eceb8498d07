"""Flat units: layout, storage, stage policies, lifetimes of parameters, and the reduction of their gradients."""

from partita.units.absent import (
    DESCRIBING,
    AbsentParameter,
    AbsentParameterError,
    Holder,
    ShardRun,
    drop_holder,
    give_to,
    holder_of,
    holders_of,
    make_absent,
    make_present,
    take_back,
)
from partita.units.blocks import LEAF, find_blocks, is_leaf
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
from partita.units.graph_tasks import accumulates, accumulates_into
from partita.units.layout import ParameterInfo, ShardSlice, Slot, UnitLayout, make_layout
from partita.units.lifetimes import ParameterLifetimes
from partita.units.parameters import FlatParameters, fill_from_rank_0, full_values
from partita.units.plan import PlanSettings, UnitPlan, plan_frozen, plan_trained
from partita.units.policy import Lifetime, Offload, StagePolicy, stage_policy
from partita.units.reducer import GradientReducer
from partita.units.reduction import BackwardConductor, BackwardListener, BackwardPlan, ReductionSettings
from partita.units.residence import Always, Gathered, Mapped, Residence, Residency
from partita.units.taken import TakenGradient
from partita.units.unit import GradState, Unit
from partita.units.watch import has_hooks_of_program, has_reducer

__all__ = [
    "DESCRIBING",
    "LEAF",
    "AbsentParameter",
    "AbsentParameterError",
    "Always",
    "BackwardConductor",
    "BackwardListener",
    "BackwardPlan",
    "FlatParameters",
    "Gathered",
    "GradState",
    "GradientReducer",
    "Holder",
    "Lifetime",
    "Mapped",
    "ModelUnits",
    "NamedParameter",
    "Offload",
    "ParameterGathers",
    "ParameterGroup",
    "ParameterInfo",
    "ParameterLifetimes",
    "PlanSettings",
    "ReductionSettings",
    "Residence",
    "Residency",
    "ShardRun",
    "ShardSlice",
    "Slot",
    "StagePolicy",
    "TakenGradient",
    "Unit",
    "UnitLayout",
    "UnitPlan",
    "UnitSettings",
    "accumulates",
    "accumulates_into",
    "build_units",
    "drop_holder",
    "fill_from_rank_0",
    "find_blocks",
    "full_values",
    "give_to",
    "has_hooks_of_program",
    "has_reducer",
    "holder_of",
    "holders_of",
    "is_leaf",
    "lifetime_of",
    "make_absent",
    "make_layout",
    "make_present",
    "plan_frozen",
    "plan_trained",
    "require_on",
    "stage_policy",
    "take_back",
]
