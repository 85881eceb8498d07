"""The layer of experts, which cannot be made here."""

from partita.compat.deepspeed._absent import Placeholder, absent_names

__getattr__ = absent_names(__name__)


class MoE(Placeholder):
    """There is no expert parallelism."""
