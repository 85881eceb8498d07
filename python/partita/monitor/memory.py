"""What takes memory: the states of a model by kind, beside what the process or the GPU has in use."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import torch
from torch import Tensor

from partita.device import kernels
from partita.model import ModelPart
from partita.monitor.machine import memory_bytes

KINDS = ("parameters", "masters", "optimizer states", "gradients", "staging", "gathered")


def model_states(parts: Sequence[ModelPart]) -> dict[str, dict[str, int]]:
    """Bytes of this rank by the type of device ("cpu", "cuda") and kind. Memory that two kinds share is counted once,
    in the order of `KINDS`: fp32 parameters that are their own masters are parameters.

    "gathered": full parameters that come and go. "staging": buffers that gradients of several units use in turns.
    """
    memory = _Memory()
    for part in parts:
        for unit in part.units:
            memory.add("parameters", unit.own_params if unit.residence.comes_and_goes else unit.params)
            memory.add("parameters", unit.updated)
        for frozen in part.frozen:
            memory.add("parameters", frozen.own_params if frozen.residence.comes_and_goes else frozen.params)
        for unit in part.units:
            memory.add("masters", unit.master)
            memory.add("masters", unit.remainder)
        for unit in part.units:
            for state in unit.states.values():
                memory.add("optimizer states", state)
        for unit in part.units:
            memory.add("gradients", unit.full_grads)
            memory.add("gradients", unit.reduced)
        where = part.units[0].params.device.type if part.units else "cpu"
        memory.count(where, "staging", part.reducer.staging_bytes)
        if part.reducer.landing_bytes:
            memory.count("cpu", "staging", part.reducer.landing_bytes)
        memory.count(where, "gathered", sum(u.residence.gathered_bytes for u in [*part.units, *part.frozen]))
    return memory.by_device


def breakdown_text(step: int, states: dict[str, dict[str, int]], device: torch.device) -> str:
    """One line."""
    in_use = memory_bytes(device)
    groups = [
        (f"on the {'host' if where == 'cpu' else 'GPU'}: " if len(states) > 1 else "")
        + ", ".join(f"{kind} {_mb(kinds[kind])}" for kind in KINDS if kinds.get(kind))
        for where, kinds in states.items()
    ]
    of = "the GPU" if device.type == "cuda" else "the process"
    now = _mb(in_use["memory_now_bytes"]) if "memory_now_bytes" in in_use else "not known"
    peak = _mb(in_use["memory_peak_bytes"])
    return f"memory after step {step}: {'; '.join(groups)}; {of} has {now} in use, {peak} at most"


class _Memory:
    """Bytes by device and kind, each address once."""

    def __init__(self) -> None:
        self.by_device: dict[str, dict[str, int]] = {}
        self._taken: list[tuple[str, int, int]] = []  # device, begin, end

    def add(self, kind: str, tensor: Tensor | None) -> None:
        if tensor is None or tensor.untyped_storage().nbytes() == 0:
            return
        device = str(tensor.device)
        begin = kernels.address(tensor)
        end = begin + tensor.nbytes
        free = tensor.nbytes
        for where, a, b in self._taken:
            if where == device:
                free -= max(0, min(b, end) - max(a, begin))
        if free > 0:
            insort(self._taken, (device, begin, end))
            self.count(tensor.device.type, kind, free)

    def count(self, device: str, kind: str, nbytes: int) -> None:
        kinds = self.by_device.setdefault(device, {})
        kinds[kind] = kinds.get(kind, 0) + nbytes


def _mb(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"
