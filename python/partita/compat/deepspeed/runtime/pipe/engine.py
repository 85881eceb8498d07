"""DeepSpeed's `runtime.pipe.engine`."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.engine import PipelineEngine

__all__ = ["PipelineEngine"]

__getattr__ = absent_names(__name__)
