"""A loader that begins again when it ends."""

from partita import RepeatingLoader
from partita.compat.deepspeed._absent import absent_names

__all__ = ["RepeatingLoader"]

__getattr__ = absent_names(__name__)
