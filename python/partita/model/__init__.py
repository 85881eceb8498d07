"""A model in training: taken over, run forward and backward, watched, read and written."""

from partita.model.access import ParameterAccess, access_of
from partita.model.accumulation import Accumulation
from partita.model.flops import FlopCounter, count_flops, modules_to_watch, takes_hooks
from partita.model.format_names import DTYPE_NAMES
from partita.model.loss_scaling import LossScaling
from partita.model.part import ModelPart
from partita.model.plain import from_plain, to_plain
from partita.model.random_state import RandomState
from partita.model.state import (
    WEIGHT,
    CommonAccumulation,
    DiffersByRank,
    KeepsValues,
    Quantity,
    Section,
    Snapshot,
    Stateful,
    TrainState,
)
from partita.model.take import device_of, require_only_parameters_of
from partita.model.weights import clone_state_dict, weight_buckets

__all__ = [
    "DTYPE_NAMES",
    "WEIGHT",
    "Accumulation",
    "CommonAccumulation",
    "DiffersByRank",
    "FlopCounter",
    "KeepsValues",
    "LossScaling",
    "ModelPart",
    "ParameterAccess",
    "Quantity",
    "RandomState",
    "Section",
    "Snapshot",
    "Stateful",
    "TrainState",
    "access_of",
    "clone_state_dict",
    "count_flops",
    "device_of",
    "from_plain",
    "modules_to_watch",
    "require_only_parameters_of",
    "takes_hooks",
    "to_plain",
    "weight_buckets",
]
