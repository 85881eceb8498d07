"""Partitioned parameters, as programs see them: building them, reading and writing them, loading them."""

from partita.units import AbsentParameterError
from partita.zero.gathered import GatheredParameters
from partita.zero.init import Init
from partita.zero.leaf import (
    get_z3_leaf_modules,
    register_external_parameter,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unregister_external_parameter,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)
from partita.zero.load import Loaded, OnRanks, PartlyLoadedError, load_on_ranks, load_weights
from partita.zero.materialize import materialize
from partita.zero.sources import WeightSource

__all__ = [
    "AbsentParameterError",
    "GatheredParameters",
    "Init",
    "Loaded",
    "OnRanks",
    "PartlyLoadedError",
    "WeightSource",
    "get_z3_leaf_modules",
    "load_on_ranks",
    "load_weights",
    "materialize",
    "register_external_parameter",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]
