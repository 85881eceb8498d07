"""Where the full parameters of a unit are, and how they come and go: one class per lifetime."""

from partita.units.residence.always import Always
from partita.units.residence.base import Residence, Residency
from partita.units.residence.gathered import Gathered
from partita.units.residence.mapped import Mapped

__all__ = ["Always", "Gathered", "Mapped", "Residence", "Residency"]
