"""A job before it has a model: config, ranks, streams, batch sizes, number formats."""

from partita.run.console import ConsoleHandler
from partita.run.precision import Precision, loss_scaler_of, precision_of
from partita.run.run import Run, begin_run, checked_config, policy_of, splits_masters

__all__ = [
    "ConsoleHandler",
    "Precision",
    "Run",
    "begin_run",
    "checked_config",
    "loss_scaler_of",
    "policy_of",
    "precision_of",
    "splits_masters",
]
