"""Names of DeepSpeed's Lions. Libraries import them whether they use one or not; making one is an error."""

from partita.compat.deepspeed._absent import Placeholder

__all__ = ["DeepSpeedCPULion", "FusedLion"]


class DeepSpeedCPULion(Placeholder):
    """There is none."""


class FusedLion(Placeholder):
    """There is none."""
