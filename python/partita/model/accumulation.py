"""Micro-batches: which backward reduces its gradients, and which step updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from partita.units import StagePolicy


class Accumulation:
    """Counts micro-batches.

    Args:
        micro_batches: of one step.
        policy: the ZeRO stage.
        reduces_at_boundary: False: no backward reduces; gradients stay on their rank until `ModelPart.reduce()`.
    """

    def __init__(self, micro_batches: int, policy: StagePolicy, *, reduces_at_boundary: bool = True) -> None:
        self.micro_steps = 0
        self.boundary: bool | None = None  # said by hand; None: every `micro_batches`
        self._micro_batches = micro_batches
        self._policy = policy
        self._is_deferred = False
        self._reduces_at_boundary = reduces_at_boundary

    @property
    def is_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its step."""
        if self.boundary is not None:
            return self.boundary
        return (self.micro_steps + 1) % self._micro_batches == 0

    @property
    def unfinished(self) -> int:
        """Micro-batches of a step that has not come to its boundary; 0 where the program decides by hand."""
        return 0 if self.boundary is not None else self.micro_steps % self._micro_batches

    @property
    def reduces(self) -> bool:
        """Whether the backward of this micro-batch reduces the gradients over ranks, or accumulates them here."""
        return self._reduces_at_boundary and self.is_boundary and not self._is_deferred

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in this block accumulate on this rank. A block inside a block changes nothing.

        Raises:
            RuntimeError: the stage has no room for gradients that are not reduced.
        """
        if not self._policy.keeps_full_grads:
            raise RuntimeError(
                f"no_sync() needs full gradients on every rank, which ZeRO stage {self._policy.stage} does not keep: "
                "use stage 0 or 1, or gradient_accumulation_steps"
            )
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    def require_sync(self, call: str) -> None:
        """Raises RuntimeError inside `no_sync()`, where `call` has no place."""
        if self._is_deferred:
            raise RuntimeError(
                f"engine.{call} was called inside engine.no_sync(), where gradients stay on their rank: call it after "
                "the block"
            )

    @property
    def is_amid(self) -> bool:
        """Whether micro-batches of a step are over and others are to come."""
        return self.micro_steps % self._micro_batches != 0

    def advance(self) -> None:
        """A micro-batch is over."""
        self.micro_steps += 1

    def restart(self) -> None:
        """The step begins anew."""
        self.micro_steps -= self.micro_steps % self._micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches so far, and those of a step."""
        return {"micro_steps": self.micro_steps, "micro_batches": self._micro_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`. Where a step has another number of micro-batches now, the same number of steps
        counts: the next micro-batch begins a step."""
        steps, amid = divmod(state["micro_steps"], state["micro_batches"])
        same = state["micro_batches"] == self._micro_batches
        self.micro_steps = steps * self._micro_batches + (amid if same else 0)
