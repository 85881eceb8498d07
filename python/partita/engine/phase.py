"""The order in which an engine is called."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor


class Phase(Enum):
    """Where a micro-batch is; the value says what it means."""

    READY = "neither a forward nor gradients since the last step()"
    FORWARD = "a forward has run, and no gradients are there"
    BACKWARD = "gradients are there, waiting for step()"
    TORN = "a load that failed when a part of the state was loaded"
    DESTROYED = "destroy() was called"


class LifecycleError(RuntimeError):
    """An engine method was called in a phase that does not allow it."""


WHOLE_AGAIN = "load_checkpoint() of a sound checkpoint, with all states, makes the state whole"

# What a program that made this call in this phase has to do.
_CALLS = ("__call__()", "backward()", "step()")
_WAYS_OUT = {
    ("step()", Phase.READY): "there are no gradients: call engine.backward(loss) before each step()",
    ("step()", Phase.FORWARD): "the loss had no backward: call engine.backward(loss) before step()",
    **{(call, Phase.TORN): WHOLE_AGAIN for call in _CALLS},
    **{(call, Phase.DESTROYED): "initialize() makes another engine" for call in _CALLS},
}


def require(call: str, phase: Phase, *allowed: Phase) -> None:
    """Raises LifecycleError, naming the call, both phases and the way out, unless `phase` is one of `allowed`."""
    if phase in allowed:
        return
    say = _WAYS_OUT.get((call, phase), "")
    needed = " or ".join(p.name for p in allowed)
    raise LifecycleError(
        f"engine.{call} was called in phase {phase.name} ({phase.value}); it needs phase {needed} "
        f"({' or '.join(p.value for p in allowed)}){': ' + say if say else ''}"
    )


def require_loss(loss: Any) -> None:
    """Raises ValueError, saying what to do, unless a backward can begin at `loss`."""
    if isinstance(loss, int | float):
        raise ValueError(
            f"engine.backward() needs the loss as the model returned it, not a {type(loss).__name__}, which gradients "
            "cannot flow through: call engine.backward(loss), and loss.item() only to print it"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"engine.backward() needs a scalar loss, not a {what}: reduce it with .mean() or .sum()")
    if not loss.requires_grad:
        raise ValueError(
            "engine.backward(): no gradient can flow through this loss. It was computed under torch.no_grad() or "
            "inference_mode(), detached, or made anew (torch.tensor(loss)): call loss = engine(batch) with gradients "
            "enabled and give that loss to engine.backward()"
        )
