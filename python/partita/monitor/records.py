"""What monitors are told about a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepWaits:
    """Who was waited for in one optimizer step.

    slowest_rank: whom the others waited for longest; None: nobody waited long enough to tell.
    waited_share: of the step's time that ranks spent waiting for each other, from 0 to 1.
    """

    slowest_rank: int | None
    waited_share: float


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step was like.

    loss: mean over micro-batches and ranks; None: no loss went through engine.backward().
    lr: of each param group, after the step.
    grad_norm: of the mean gradient, before clipping.
    loss_scale: None: losses are not scaled.
    skipped_steps: so far.
    waits: None: not known.
    tokens: of all ranks; None: not known.
    flops: floating-point operations of the model's forwards and backwards on all ranks; None: not known.
    phases_ms: of this rank, by name, of each step whose times have become known since the last report: on a GPU
        these are often those of the step before. Empty: none have, or phases are not timed.
    """

    step: int
    loss: float | None
    lr: list[float]
    grad_norm: float
    loss_scale: float | None
    skipped_steps: int
    skipped: bool
    waits: StepWaits | None = None
    tokens: int | None = None
    flops: float | None = None
    phases_ms: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Record:
    """Values of one step for the sinks.

    step, samples: so far, over all ranks.
    values: by name.
    is_own: the names are the engine's; False: the program's, of `Engine.log()`.
    time_s: of the clock, since 1970.
    """

    step: int
    samples: int
    values: Mapping[str, float]
    is_own: bool = True
    time_s: float = 0.0


_EVENTS = {
    "loss": "train_loss",
    "forward_ms": "elapsed_time_ms_forward",
    "backward_ms": "elapsed_time_ms_backward",
    "update_ms": "elapsed_time_ms_step",
}


def events_of(record: Record) -> dict[str, float]:
    """The values under DeepSpeed's names, such as `Train/Samples/train_loss`. A program's values keep their names."""
    if not record.is_own:
        return dict(record.values)
    return {f"Train/Samples/{_EVENTS.get(name, name)}": value for name, value in record.values.items()}
