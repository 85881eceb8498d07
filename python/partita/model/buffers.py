"""Buffers that change in training, BatchNorm's statistics say: every rank has rank 0's.

[Note: buffers]
Each rank's forward writes its own values into such buffers, so ranks would evaluate and save different models. After
every update they take those of rank 0, in one broadcast per dtype. Most buffers never differ. Which ones do is found
out by comparing all of them in the updates 1, 2, 4, 8, ...; a buffer that has differed once belongs to those that are
sent. So a model whose buffers are the same everywhere pays nothing. What was found goes to the host beside the next
step, and is read after the next update: no host waits for it. Buffers that a state dict leaves out, such as caches,
stay as they are: they need not even have one size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from partita.comm import Communicator, Reduction
from partita.device import HostCopy, Streams


class SharedBuffers:
    """Rank 0's buffers, on all ranks. See [Note: buffers].

    Args:
        module: has the same buffers on all ranks.
        communicator: of the ranks that have this module.
    """

    def __init__(self, module: nn.Module, communicator: Communicator, streams: Streams) -> None:
        self._module = module
        self._communicator = communicator
        self._streams = streams
        self._differing: set[str] = set()
        self._compared: tuple[list[str], HostCopy] | None = None  # names, and 1.0 for each that differs
        self._updates = 0

    def after_update(self) -> None:
        """Called after each update. A collective."""
        self._updates += 1
        if self._communicator.world_size == 1:
            return
        self._learn()
        if self._updates & (self._updates - 1) == 0:
            self.share_all()
        elif self._differing:
            self._share([buffer for name, buffer in _kept_buffers(self._module) if name in self._differing])

    @torch.no_grad()
    def share_all(self) -> None:
        """Every buffer that a state dict has takes rank 0's values. A collective."""
        self._learn()
        named = dict(_kept_buffers(self._module))
        if self._communicator.world_size == 1 or not named:
            return
        before = [buffer.clone() for buffer in named.values()]
        self._share(list(named.values()))
        differs = [(_bits(a) != _bits(b)).any() for a, b in zip(before, named.values(), strict=True)]
        flags = torch.stack(differs).to(torch.float64)
        self._communicator.all_reduce(flags, Reduction.max).wait()
        self._compared = (list(named), self._streams.copy_to_host(flags))

    def _learn(self) -> None:
        """Which buffers differed when all were compared is known; on a GPU, long after that."""
        if self._compared is not None:
            (names, flags), self._compared = self._compared, None
            found = zip(names, flags.wait().tolist(), strict=True)
            self._differing |= {name for name, differs in found if differs}

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
