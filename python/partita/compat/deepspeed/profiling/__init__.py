"""What a model costs."""

from partita.compat.deepspeed._absent import absent_names

__getattr__ = absent_names(__name__)
