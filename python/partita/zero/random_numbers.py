"""The random numbers of rank 0, on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partita.comm import Communicator, any_rank, ranks_that_differ


class SameRandomNumbers:
    """Every rank draws rank 0's numbers from torch; afterwards it goes on with its own, if they were others.

    Raises:
        RuntimeError: at the end, on all ranks, if they did not draw the same numbers.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._own: list[Tensor] = []
        self._differed = False

    def __enter__(self) -> None:
        # Where one rank has used its GPU before, all have random numbers there from now on.
        self._own = _random_states(any_rank(self._communicator, _has_gpu_numbers()))
        shared = [state.clone() for state in self._own]
        for state in shared:
            self._communicator.broadcast(state, 0).wait()
        self._differed = any(not torch.equal(a, b) for a, b in zip(self._own, shared, strict=True))
        _set_random_states(shared)

    def __exit__(self, kind: Any, *_: Any) -> None:
        now = _random_states(_has_gpu_numbers())
        if self._differed:
            _set_random_states(self._own)
        if kind is not None or self._communicator.world_size == 1:
            return
        different = ranks_that_differ(self._communicator, b"".join(state.numpy().tobytes() for state in now))
        if different:
            raise RuntimeError(
                f"ranks built different models inside partita.zero.Init(): rank {', '.join(map(str, different))} drew "
                "other random numbers than rank 0; build the same modules in the same order on every rank"
            )


def _has_gpu_numbers() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _random_states(on_gpu: bool) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
