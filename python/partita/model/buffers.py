"""Buffers that change in training, BatchNorm's statistics say: every rank has rank 0's.

[Note: buffers]
Each rank's forward writes its own values into such buffers, so ranks would evaluate and save different models. After
every update they take those of rank 0, in one broadcast per dtype. Most buffers never differ. Which ones do is found
out by comparing all of them in the updates 1, 2, 4, 8, ...; a buffer that has differed once belongs to those that are
sent. So a model whose buffers are the same everywhere pays nothing, and no host waits in other steps. Buffers that a
state dict leaves out, such as caches, stay as they are: they need not even have one size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from partita.comm import Communicator, any_rank_each


class SharedBuffers:
    """Rank 0's buffers, on all ranks. See [Note: buffers].

    Args:
        module: has the same buffers on all ranks.
        communicator: of the ranks that have this module.
    """

    def __init__(self, module: nn.Module, communicator: Communicator) -> None:
        self._module = module
        self._communicator = communicator
        self._differing: set[str] = set()
        self._updates = 0

    def after_update(self) -> None:
        """Called after each update. A collective."""
        self._updates += 1
        if self._communicator.world_size == 1:
            return
        if self._updates & (self._updates - 1) == 0:
            self.share_all()
        elif self._differing:
            self._share([buffer for name, buffer in _kept_buffers(self._module) if name in self._differing])

    @torch.no_grad()
    def share_all(self) -> None:
        """Every buffer that a state dict has takes rank 0's values. A collective; the host waits."""
        named = dict(_kept_buffers(self._module))
        if self._communicator.world_size == 1 or not named:
            return
        before = [buffer.clone() for buffer in named.values()]
        self._share(list(named.values()))
        differs = [not torch.equal(_bits(a), _bits(b)) for a, b in zip(before, named.values(), strict=True)]
        agreed = any_rank_each(self._communicator, differs)
        self._differing |= {name for name, differed in zip(named, agreed, strict=True) if differed}

    @torch.no_grad()
    def _share(self, buffers: list[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for together in by_dtype.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in together])
            self._communicator.broadcast(flat, 0).wait()
            for buffer, values in zip(together, torch.split(flat, [b.numel() for b in together]), strict=True):
                buffer.copy_(values.view(buffer.shape))


def _kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has, each once."""
    seen: set[Tensor] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set and buffer not in seen:
                seen.add(buffer)
                yield f"{prefix}.{name}" if prefix else name, buffer


def _bits(tensor: Tensor) -> Tensor:
    """NaN is like NaN there."""
    return tensor.reshape(-1).view(torch.uint8)
