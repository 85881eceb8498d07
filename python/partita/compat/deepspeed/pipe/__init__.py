"""Pipelines: see `partita.pipeline`."""

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]

__getattr__ = absent_names(__name__)
