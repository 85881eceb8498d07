"""Operations of a model's forward."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.profiling.flops_profiler.profiler import FlopsProfiler, get_model_profile

__all__ = ["FlopsProfiler", "get_model_profile"]

__getattr__ = absent_names(__name__)
