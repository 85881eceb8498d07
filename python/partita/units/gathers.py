"""Updated parameters on their way from the ranks that updated them."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from partita.comm import CommunicationError, Handle
from partita.device import AcrossStreams, Streams
from partita.units.module_hooks import OwnHook
from partita.units.unit import Unit


class ParameterGathers:
    """The all-gathers of a step, waited for together, or each where a forward first needs it.

    Args:
        streams: of the device that computes.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._under_way: deque[tuple[Unit, Handle]] = deque()  # in the order of their start
        self._arrived: dict[int, AcrossStreams] = {}  # by the identity of a unit, where forwards wait
        self._hooks: list[RemovableHandle] = []

    def wait_in_forward(self, model: nn.Module, units: list[Unit]) -> None:
        """From now on the forward of each module waits for the parameters that it uses."""
        # By identity: hooks of a model that outlives its engine must not keep the units.
        unit_of = {p: id(unit) for unit in units for p in unit.parameters}
        self._arrived |= {id(unit): AcrossStreams(self._streams) for unit in units}
        wait: Any = torch.compiler.disable(_before_forward)  # type: ignore[no-untyped-call]
        own = weakref.ref(self)
        for module in model.modules():
            used = {unit_of[p] for p in module.parameters(recurse=_reads_children(module)) if p in unit_of}
            if used:
                self._hooks.append(module.register_forward_pre_hook(OwnHook(partial(wait, own, used))))

    def add(self, unit: Unit, handle: Handle) -> None:
        """A unit's parameters are being gathered."""
        self._under_way.append((unit, handle))

    def wait(self) -> None:
        """All parameters are there (on a GPU: for what is queued from now on)."""
        while self._under_way:
            self._wait_for_next()

    def abandon(self) -> None:
        """An error that ends the job has been raised: nobody waits for the rest, so that it is not raised again."""
        self._under_way.clear()

    def close(self) -> None:
        """Lets go of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def wait_for(self, used: set[int]) -> None:
        """The parameters of these units are there, given by identity; on a GPU, for the current stream."""
        while any(id(unit) in used for unit, _ in self._under_way):
            self._wait_for_next()
        for unit in used:
            self._arrived[unit].use()

    def _wait_for_next(self) -> None:
        unit, handle = self._under_way.popleft()
        try:
            handle.wait()
        except CommunicationError:
            self.abandon()
            raise
        if (arrived := self._arrived.get(id(unit))) is not None:
            arrived.is_ready()


def _before_forward(own: weakref.ref[ParameterGathers], used: set[int], _module: nn.Module, _inputs: Any) -> None:
    """A hook, over a weak reference: a model may outlive its engine."""
    if (gathers := own()) is not None:
        gathers.wait_for(used)


def _reads_children(module: nn.Module) -> bool:
    """Modules of torch.nn such as MultiheadAttention use parameters of their children without calling these."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )
