"""A model in training."""

from partita.model.access import ParameterAccess
from partita.model.changes import ModelGuard
from partita.model.export import save_weights
from partita.model.loss_scaling import BackwardWatch
from partita.model.placement import (
    clone_state_dict,
    device_of,
    optimized_parameters,
    place_untrained,
    refuse_compiled,
    untrained_parameters,
)
from partita.model.recompute import ActivationCheckpoints

__all__ = [
    "ActivationCheckpoints",
    "BackwardWatch",
    "ModelGuard",
    "ParameterAccess",
    "clone_state_dict",
    "device_of",
    "optimized_parameters",
    "place_untrained",
    "refuse_compiled",
    "save_weights",
    "untrained_parameters",
]
