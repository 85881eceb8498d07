"""Compression: there is none, but for two helpers that programs borrow."""

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)
