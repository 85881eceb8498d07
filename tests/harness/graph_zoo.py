"""Blocks that return what they made in every form, and programs that ask autograd for more than one backward.

Any block trains in any way: with the bits of plain torch on one rank, and with those of stage 0 on several.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 5
Forward = Callable[..., Tensor]


class ZooBlock(nn.Module):
    """Returns a tensor. Shapes that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH)
        self.other: list[ZooBlock] = []  # another block, which is not part of this one

    def change(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(torch.tanh(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return x + self.change(x)

    def through(self, x: Tensor) -> Tensor:
        """As the model calls the block."""
        return self(x)  # type: ignore[no-any-return]


class InPlace(ZooBlock):
    def forward(self, x: Tensor) -> Any:
        x += self.change(x)
        return x


class InPlaceThroughView(ZooBlock):
    """What it returns is its input, which it changed through a view."""

    def forward(self, x: Tensor) -> Any:
        x.view(-1).add_(self.change(x).view(-1))
        return x


@dataclass
class Output:
    hidden: Tensor
    nothing: None = None


class InDataclass(ZooBlock):
    def forward(self, x: Tensor) -> Any:
        return Output(x + self.change(x))

    def through(self, x: Tensor) -> Tensor:
        return self(x).hidden  # type: ignore[no-any-return]


class InDataclassInTuple(InDataclass):
    def forward(self, x: Tensor) -> Any:
        return ({"a": [Output(x + self.change(x))]},)

    def through(self, x: Tensor) -> Tensor:
        return self(x)[0]["a"][0].hidden  # type: ignore[no-any-return]


Named = namedtuple("Named", ["hidden", "number"])


class InNamedTuple(InDataclass):
    def forward(self, x: Tensor) -> Any:
        return Named(x + self.change(x), 3)


class Opaque:
    """An object that no one can look into."""

    __slots__ = ("_call",)

    def __init__(self, hidden: Tensor) -> None:
        self._call = lambda: hidden

    @property
    def hidden(self) -> Tensor:
        return self._call()


class InObject(InDataclass):
    def forward(self, x: Tensor) -> Any:
        return Opaque(x + self.change(x))


class IntoDict(ZooBlock):
    """Returns nothing, and writes into what it is given."""

    def forward(self, state: Any) -> Any:
        state["hidden"] = state["hidden"] + self.change(state["hidden"])

    def through(self, x: Tensor) -> Tensor:
        state = {"hidden": x}
        self(state)
        return state["hidden"]


class IntoList(ZooBlock):
    def forward(self, hidden: Any) -> Any:
        hidden.append(hidden[-1] + self.change(hidden[-1]))

    def through(self, x: Tensor) -> Tensor:
        hidden = [x]
        self(hidden)
        return hidden[-1]


class CheckpointsInside(IntoDict):
    """Nothing of what it returns tells of it, and its parameters are needed to compute it again."""

    def change(self, x: Tensor) -> Tensor:
        return checkpoint(super().change, x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsItself(ZooBlock):
    def through(self, x: Tensor) -> Tensor:
        return checkpoint(self.__call__, x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsReentrant(IntoDict):
    def change(self, x: Tensor) -> Tensor:
        return checkpoint(super().change, x, use_reentrant=True)  # type: ignore[no-any-return]


class ReadsOther(IntoDict):
    """Uses a weight of another block, which that block uses too."""

    def change(self, x: Tensor) -> Tensor:
        x = super().change(x)
        return x + F.linear(torch.tanh(F.linear(x, self.other[0].up.weight)), self.other[0].down.weight)


class _Product(torch.autograd.Function):
    """x @ w.t(); `keeps`: with the weight itself on the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps: bool) -> Tensor:
        ctx.save_for_backward(x, *([] if keeps else [weight, weight.t()]))
        ctx.weight = weight if keeps else None
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, *saved = ctx.saved_tensors
        weight = saved[0] if saved else ctx.weight
        return grad @ weight, grad.t() @ x, None


class SavesByHand(IntoDict):
    keeps = False

    def change(self, x: Tensor) -> Tensor:
        x = torch.tanh(_Product.apply(x, self.up.weight, self.keeps) + self.up.bias)  # type: ignore[no-untyped-call]
        return _Product.apply(x, self.down.weight, self.keeps) + self.down.bias  # type: ignore[no-untyped-call,no-any-return]


class KeepsParameter(SavesByHand):
    keeps = True


class SavesOnCpu(InPlace):
    """With hooks on saved tensors of its own, which are the only ones that torch calls then."""

    def change(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().change(x)


BLOCKS: dict[str, type[ZooBlock]] = {
    kind.__name__: kind
    for kind in (
        ZooBlock,
        InPlace,
        InPlaceThroughView,
        InDataclass,
        InDataclassInTuple,
        InNamedTuple,
        InObject,
        IntoDict,
        IntoList,
        CheckpointsInside,
        CheckpointsItself,
        CheckpointsReentrant,
        ReadsOther,
        SavesByHand,
        KeepsParameter,
        SavesOnCpu,
    )
}


class ZooModel(nn.Module):
    """Blocks between two layers of their own; `encode` is a method beside `forward`."""

    def __init__(self, block: type[ZooBlock], blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, 1)
        self.order = list(range(blocks))
        for i, each in enumerate(self.blocks):
            each.other = [self.blocks[i - 2]]  # type: ignore[assignment,list-item]

    def encode(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for i in self.order:
            x = self.blocks[i].through(x)  # type: ignore[operator]
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encode(x)).float()  # type: ignore[no-any-return]


# -- what a program does in a step: from its forward to a loss

Way = Callable[[Forward, nn.Module, Tensor], Tensor]


def plainly(forward: Forward, _model: nn.Module, x: Tensor) -> Tensor:
    return forward(x).square().mean()


def gradient_of(output: Tensor, x: Tensor, **how: bool) -> Tensor:
    return torch.autograd.grad(output.sum(), x, **how)[0]  # type: ignore[no-any-return]


def with_penalty(forward: Forward, _model: nn.Module, x: Tensor) -> Tensor:
    """F30: the norm of the gradient is part of the loss."""
    x = x.clone().requires_grad_()
    output = forward(x)
    return output.mean() + (gradient_of(output, x, create_graph=True).norm(dim=1) - 1).square().mean()


def with_two_penalties(forward: Forward, model: nn.Module, x: Tensor) -> Tensor:
    """Two forwards, and two gradients of each before there is a loss."""
    return with_penalty(forward, model, x) + with_penalty(forward, model, 2 * x)


def with_third_order(forward: Forward, _model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    first = gradient_of(forward(x), x, create_graph=True)
    second = gradient_of(first.square(), x, create_graph=True)
    return second.square().mean()


def after_other_gradients(forward: Forward, model: nn.Module, x: Tensor) -> Tensor:
    """F33: gradients that train nothing, in training and in evaluation, between forward and backward too."""
    inputs = x.clone().requires_grad_()
    gradient_of(forward(inputs), inputs)
    output = forward(inputs)
    for mode in (False, True):
        model.train(mode)
        gradient_of(forward(inputs), inputs)
    scale = gradient_of(output, inputs, retain_graph=True).norm()
    return (output * scale).mean()


def between_hooks(forward: Forward, _model: nn.Module, x: Tensor) -> Tensor:
    """Saved tensors of the engine's forward belong to the program's hooks."""
    with torch.autograd.graph.save_on_cpu():
        return forward(x).square().mean()


def two_forwards(forward: Forward, _model: nn.Module, x: Tensor) -> Tensor:
    return (forward(x) * forward(2 * x)).mean()


def by_another_method(_forward: Forward, model: nn.Module, x: Tensor) -> Tensor:
    return model.last(model.encode(x)).float().square().mean()  # type: ignore[operator,no-any-return]


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        plainly,
        with_penalty,
        with_two_penalties,
        with_third_order,
        after_other_gradients,
        between_hooks,
        two_forwards,
        by_another_method,
    )
}


def is_possible(block: str, way: str) -> bool:
    """torch refuses reentrant checkpoints with `autograd.grad()`. A Function that keeps a parameter on its context
    cannot be differentiated twice in stage 3, see [Note: lifetimes]."""
    twice = "penalt" in way or way == "with_third_order"
    return not (
        (block == "CheckpointsReentrant" and (twice or way == "after_other_gradients"))
        or (block == "KeepsParameter" and twice)
    )


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
