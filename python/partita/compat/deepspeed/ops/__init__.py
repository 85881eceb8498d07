"""DeepSpeed's optimizers and kernels by their names."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.ops import adagrad, adam, lamb, lion

__all__ = ["adagrad", "adam", "lamb", "lion"]

__getattr__ = absent_names(__name__)
