"""One optimizer step, and what became of it."""

from partita.step.optimizer_step import OptimizerStep

__all__ = ["OptimizerStep"]
