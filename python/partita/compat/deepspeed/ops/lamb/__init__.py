"""The name of DeepSpeed's LAMB; making one is an error."""

from partita.compat.deepspeed._absent import Placeholder

__all__ = ["FusedLamb"]


class FusedLamb(Placeholder):
    """There is none."""
