"""Gradients into flat buffers: cast, scaled, added up, and looked at where a run is about to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partita._core import Span
from partita.device import kernels
from partita.device.streams import Streams
from partita.units.taken import fresh
from partita.units.unit import Unit


class Packing:
    """Moves the gradients of units, as autograd gives them, into full buffers.

    Args:
        units: by their index.
        scale: what every gradient is multiplied by.

    Attributes:
        watches_finiteness: every gradient is looked at as it is packed.
    """

    def __init__(self, units: Sequence[Unit], scale: float, streams: Streams) -> None:
        self.watches_finiteness = False
        self._units = units
        self._scale = scale
        self._streams = streams
        self._offsets = [unit.offsets() for unit in units]
        self._finiteness: list[tuple[str, Tensor]] = []
        self._producers: list[set[Any]] = [set() for _ in units]  # streams that gradients under way come from

    def produced(self, index: int) -> None:
        """The current stream has made a gradient of this unit."""
        self._producers[index].add(self._streams.current())

    def pack(self, index: int, buffer: Tensor, *, factor: Tensor | None, accumulate: bool) -> None:
        """Moves the gradients of a unit into a buffer. A parameter without a gradient counts as one with zeros.

        Args:
            factor: one float64 on the device of the gradients, which these are multiplied by; None: 1.
        """
        unit = self._units[index]
        given = [fresh(p) for p in unit.parameters]
        for stream in self._producers[index]:
            self._streams.come_after(stream, (g for g in given if g is not None))
        self._producers[index].clear()
        grads = [None if g is None else _dense(g) for g in given]
        del given  # a gradient that is not dense goes
        if self.watches_finiteness:
            named = zip(unit.layout.slots, grads, strict=True)
            self._finiteness += [(slot.name, kernels.is_finite(g)) for slot, g in named if g is not None]
        zeros = kernels.DTYPES[unit.dtype]
        spans = [
            Span(0, slot.numel, zeros) if g is None else kernels.span(g)
            for g, slot in zip(grads, unit.layout.slots, strict=True)
        ]
        kernels.pack(buffer, spans, self._offsets[index], scale=self._scale, factor=factor, accumulate=accumulate)

    def add(self, index: int, slot: int, gradient: Tensor, buffer: Tensor) -> None:
        """Adds the gradient of one parameter of a unit to what is in a buffer."""
        unit, grad = self._units[index], _dense(gradient)
        if self.watches_finiteness:
            self._finiteness.append((unit.layout.slots[slot].name, kernels.is_finite(grad)))
        kernels.pack(buffer, [kernels.span(grad)], [self._offsets[index][slot]], scale=self._scale, accumulate=True)

    def take_finiteness(self) -> list[tuple[str, Tensor]]:
        """The gradients that were looked at since the last call: name of the parameter, and whether all elements are
        finite, a bool on their device."""
        taken, self._finiteness = self._finiteness, []
        return taken

    def forget(self) -> None:
        """The gradients under way, and what was seen of others, are of no interest any more."""
        for producers in self._producers:
            producers.clear()
        self._finiteness = []


def _dense(grad: Tensor) -> Tensor:
    """A gradient as a contiguous strided tensor; a sparse one is densified."""
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    return grad.contiguous()
