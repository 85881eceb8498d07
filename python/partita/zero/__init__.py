"""Partitioned parameters, as programs see them: building them, reading and writing them, loading them."""

from partita.units import AbsentParameterError
from partita.zero.gathered import GatheredParameters
from partita.zero.init import Init
from partita.zero.load import WeightSource, load_weights
from partita.zero.materialize import materialize

__all__ = ["AbsentParameterError", "GatheredParameters", "Init", "WeightSource", "load_weights", "materialize"]
