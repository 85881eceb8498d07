"""Models by how their gradients come: one by one, of given sizes, several times, or not at all."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from reference import ODD_MODEL, Training, numbers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYERS = 6
WIDTH = 8


class Chain(nn.Module):
    """Layers of one parameter each, whose gradients arrive from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().mean()


def chain_micro_batch(forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, WIDTH)))


CHAIN = Training(Chain, chain_micro_batch)


class Vectors(nn.Module):
    """One parameter for each size, each with a gradient of its own; 0 is a size."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors = nn.ParameterList(torch.randn(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.vectors[0].dtype)
        return sum((x[i, : v.numel()] * (v + v * v)).sum().float() for i, v in enumerate(self.vectors))


def vectors_micro_batch(sizes: tuple[int, ...], forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, len(sizes), max(sizes))))


def vectors(*sizes: int) -> Training:
    return Training(partial(Vectors, sizes), partial(vectors_micro_batch, sizes))


class Checkpointed(nn.Module):
    """Tied embedding and head, a frozen layer and one used in two checkpoints; `reentrant` None: no checkpoints."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embed = nn.Embedding(11, 6)
        self.shared = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.own = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self._run(self._first, x)
        x = self._run(self._second, x)
        return F.cross_entropy(self._run(self.head, x).float().flatten(0, -2), targets.flatten())

    def _first(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(self.shared(x)))

    def _second(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.own(x))) + self.frozen(x)

    def _run(self, function: Any, x: Tensor) -> Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool | None) -> Training:
    return Training(partial(Checkpointed, reentrant), ODD_MODEL.micro_batch)


class Repeated(nn.Module):
    """A layer in as many reentrant checkpoints as is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, times: int) -> Tensor:
        x = x.to(self.layer.weight.dtype)
        for _ in range(times):
            x = torch.tanh(checkpoint(self.layer, x, use_reentrant=True))
        return x.float().square().mean()


def repeated_micro_batch(times: tuple[int, ...], forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, 5).requires_grad_(), times[step]))


def repeated(*times: int) -> Training:
    return Training(Repeated, partial(repeated_micro_batch, times), steps=len(times))


class Branches(nn.Module):
    """Layers of which a micro-batch uses some; the last is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        loss = x.sum()
        for i in used:
            loss = loss + self.layers[i](x.to(self.layers[i].weight.dtype)).float().square().mean()
        return loss


def no_layer_on_rank_1(step: int, index: int) -> list[int]:
    return [] if index % 2 else [0, 1, 2]


def layer_1_not_on_rank_1(step: int, index: int) -> list[int]:
    return [0, 2] if index % 2 else [0, 1, 2]


def layer_1_not_in_first_micro_batch(step: int, index: int) -> list[int]:
    return [0, 2] if index < 2 else [0, 1, 2]


def layer_1_not_in_last_micro_batch(step: int, index: int) -> list[int]:
    return [2, 0] if index >= 2 else [0, 1, 2]


def layer_1_not_in_second_step(step: int, index: int) -> list[int]:
    return [0, 2] if step == 1 else [0, 1, 2]


def layer_1_from_second_step_on(step: int, index: int) -> list[int]:
    return [0, 1, 2] if step else [0, 2]


def other_layer_on_each_rank(step: int, index: int) -> list[int]:
    return [(step + index) % 3]


USES = [
    no_layer_on_rank_1,
    layer_1_not_on_rank_1,
    layer_1_not_in_first_micro_batch,
    layer_1_not_in_last_micro_batch,
    layer_1_not_in_second_step,
    layer_1_from_second_step_on,
    other_layer_on_each_rank,
]


def branches_micro_batch(use: Any, forward: Any, backward: Any, step: int, index: int) -> None:
    backward(forward(numbers(step, index, 3, 5).requires_grad_(), use(step, index)))


def branches(use: Any, steps: int = 3) -> Training:
    return Training(Branches, partial(branches_micro_batch, use), steps)


# One of each kind.
ZOO: dict[str, Training] = {
    "odd": ODD_MODEL,
    "chain": CHAIN,
    "sizes": vectors(7, 1, 5, 11),
    "empty": vectors(5, 0, 3),
    "checkpoints": checkpointed(False),
    "reentrant checkpoints": checkpointed(True),
    "fewer reentrant checkpoints": repeated(3, 1, 2, 0, 3),
    **{use.__name__.replace("_", " "): branches(use) for use in USES},
}
