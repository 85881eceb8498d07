"""Gathered parameters that several streams use: each waits for their arrival, and their memory goes after all uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gathered_alone import gathered
from late_streams import LateStreams
from partita.units import ParameterGathers
from torch import Tensor, nn


class SeenStreams(LateStreams):
    """Knows which streams may see what copies brought, and which have used it.

    A home is known by its storage. The memory of a home that has gone belongs to the stream on which it was allocated:
    the one that was current outside of the block in which its copy began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[int, tuple[Tensor, int, Any]] = {}  # the home, the copy that filled it, its stream
        self.uses: dict[int, set[int]] = {}
        self._numbers = count(1)

    @contextmanager
    def _behind(self, stream: str) -> Iterator[None]:
        self.outside = self.stream
        with super()._behind(stream):
            yield

    def bring(self, destination: Tensor, source: Tensor) -> Any:
        copy = super().bring(destination, source)
        storage = destination.untyped_storage()._cdata
        self.homes[storage], self.uses[storage] = (destination, copy.number, self.outside), set()
        return copy

    def see(self, tensor: Tensor) -> Tensor:
        """A use on the current stream. Garbage for a stream that has not been ordered after the tensor's arrival."""
        storage = tensor.untyped_storage()._cdata
        _, copy, _ = self.homes[storage]
        number = next(self._numbers)
        self.known[self.stream].add(number)
        self.uses[storage].add(number)
        return tensor if -copy in self.known[self.stream] else torch.full_like(tensor, float("nan"))

    def require_memory_in_order(self) -> None:
        """Whatever has gone went after all uses."""
        gone = [storage for storage, (home, _, _) in self.homes.items() if not home.untyped_storage().nbytes()]
        assert gone, "nothing has gone"
        for storage in gone:
            assert self.uses[storage] <= self.known[self.homes[storage][2]], "memory went while a stream used it"


class _Product(torch.autograd.Function):
    """As on a GPU, autograd runs an operation on the stream of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, streams: SeenStreams | None) -> Tensor:
        ctx.streams, ctx.stream = streams, streams and streams.stream
        ctx.save_for_backward(x, weight)
        return x * (streams.see(weight) if streams else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        with ctx.streams.on(ctx.stream) if ctx.streams else nullcontext():
            x, weight = ctx.saved_tensors
            weight = ctx.streams.see(weight) if ctx.streams else weight
            return grad * weight, grad * x, None


class Scale(nn.Module):
    """x * weight."""

    streams: SeenStreams | None = None

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return _Product.apply(x, self.weight if weight is None else weight, self.streams)

    def on(self, stream: str) -> AbstractContextManager[None]:
        """A stream that the program has ordered after the main one, as it does where tensors go from one to another."""
        if self.streams is None:
            return nullcontext()
        self.streams.hold_back(stream, ["main"])
        return self.streams.on(stream)


class Branches(Scale):
    """A block whose parameters are used by operations of two streams."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        with self.on("side"):
            left = super().forward(x)
        return left + super().forward(2 * x)


class Model(nn.Module):
    """The way that a module goes: which modules run on a second stream."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList([Branches(2.0), Branches(3.0)])
        self.head = Scale(0.5)  # the root's
        self.again = Scale(0.25)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.way == "blocks":
            return self.head(x)
        # The root's parameters are here since its forward began, on the main stream. This stream has no order with it:
        # what it reads comes from elsewhere.
        with self.head.streams.on("other") if self.head.streams else nullcontext():
            x = self.head(x) if self.way == "root" else self.again(x, self.again.weight)
        return x


def run(way: str, streams: SeenStreams | None) -> list[Tensor]:
    """The loss and the gradient of the inputs."""
    model = Model(way)
    for module in model.modules():
        if isinstance(module, Scale):
            module.streams = streams
    lifetimes = gathered(model, streams)
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = model(x).square().sum()
    if streams is not None:
        streams.require_memory_in_order()
    loss.backward()
    lifetimes.end_backward()
    if streams is not None:
        streams.require_memory_in_order()
        streams.check()
    lifetimes.close()
    assert x.grad is not None
    return [loss.detach(), x.grad]


@pytest.mark.parametrize("way", ["blocks", "root", "parameter"])
def test_every_stream_waits_for_a_gather_and_memory_goes_after_all_uses(way):
    """G2, for parameters: in forward and in backward, where autograd's saved tensors ask on the forward's stream."""
    for seen, expected in zip(run(way, SeenStreams()), run(way, None), strict=True):
        assert torch.equal(seen, expected)


# -- parameters that are gathered after an update, and waited for in forward (overlap_gather)


class _Gather:
    """A collective. Who waits for it knows of it by number 1."""

    def __init__(self, streams: LateStreams) -> None:
        self._streams = streams

    def wait(self) -> None:
        self._streams.known[self._streams.stream].add(1)


def test_updated_parameters_are_waited_for_by_every_stream_that_uses_them():
    """G3: two modules with parameters of one unit, on two streams; in each of two steps."""
    streams, model = LateStreams(), nn.ModuleList([Scale(1.0), Scale(2.0), Scale(3.0)])
    unit: Any = SimpleNamespace(parameters=[model[0].weight, model[1].weight])
    other: Any = SimpleNamespace(parameters=[model[2].weight])
    gathers = ParameterGathers(streams)
    gathers.wait_in_forward(model, [unit, other])
    for _ in range(2):
        streams.known.clear()
        gathers.add(unit, _Gather(streams))
        for module, stream in zip(model, ("main", "side", "third"), strict=True):
            with streams.on(stream):
                module(torch.ones(3))
        assert {stream for stream, known in streams.known.items() if 1 in known} == {"main", "side"}
    gathers.close()
