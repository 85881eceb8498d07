"""The order in which an engine is called."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a micro-batch is; the value says what it means."""

    READY = "waiting for a forward"
    FORWARD = "a forward has run, no backward yet"
    BACKWARD = "gradients are there, waiting for step()"
    DESTROYED = "destroy() was called"


class LifecycleError(RuntimeError):
    """An engine method was called in a phase that does not allow it. The message names both."""


def require(call: str, phase: Phase, *allowed: Phase) -> None:
    """Raises LifecycleError, naming both phases, unless `phase` is one of `allowed`."""
    if phase not in allowed:
        needed = " or ".join(p.name for p in allowed)
        raise LifecycleError(
            f"engine.{call} was called in phase {phase.name} ({phase.value}); it needs phase {needed} "
            f"({' or '.join(p.value for p in allowed)})"
        )
