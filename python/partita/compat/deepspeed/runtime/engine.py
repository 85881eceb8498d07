"""DeepSpeed's `runtime.engine`."""

from partita.compat.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
