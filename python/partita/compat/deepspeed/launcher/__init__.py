"""DeepSpeed's `launcher`: torchrun and `partita run` start programs here."""

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)
