"""A job before it has a model."""

from partita.run.precision import Precision, loss_scaler_of, precision_of

__all__ = ["Precision", "loss_scaler_of", "precision_of"]
