"""The random numbers of a process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class RandomState:
    """The generators of Python, numpy and torch, on the CPU and on the device that trains.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Where each generator is."""
        kind, keys, *rest = np.random.get_state(legacy=True)
        state = {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys, dtype="<u4").tobytes(), *rest),
            "torch": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def from_ranks(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        """The rank's own, where there are as many as there were. Else a new state of each generator, which follows
        from the state of rank 0 and from the rank.
        """
        if len(states) == world_size:
            return states[rank]
        start = hashlib.sha256(bytes(states[0]["torch"].tolist()) + rank.to_bytes(4, "little")).digest()
        seed = int.from_bytes(start[:4], "little")
        kind, keys, *rest = np.random.RandomState(seed).get_state(legacy=True)
        state = {
            "python": random.Random(seed).getstate(),
            "numpy": (kind, np.asarray(keys, dtype="<u4").tobytes(), *rest),
            "torch": torch.Generator(device="cpu").manual_seed(seed).get_state(),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.Generator(device=self._device).manual_seed(seed).get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The generators go on from where those of the state were."""
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.frombuffer(keys, dtype="<u4"), *rest))
        torch.set_rng_state(state["torch"])
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)
