"""Activations that are computed again in backward."""

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)
