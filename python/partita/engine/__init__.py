"""What a program calls: `initialize()` and the engine that it returns."""

from partita.engine.base import EngineBase
from partita.engine.engine import Engine, initialize
from partita.engine.keeper import Preempted
from partita.engine.phase import LifecycleError
from partita.engine.pipeline_engine import PipelineEngine

__all__ = ["Engine", "EngineBase", "LifecycleError", "PipelineEngine", "Preempted", "initialize"]
