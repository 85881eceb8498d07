"""A job before it has a model: config, ranks, streams, batch sizes, number formats."""

from partita.run.precision import Precision, loss_scaler_of, precision_of
from partita.run.run import Run, begin_run

__all__ = ["Precision", "Run", "begin_run", "loss_scaler_of", "precision_of"]
