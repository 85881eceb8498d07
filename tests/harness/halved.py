"""A backward in one piece, and in two halves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from partita.pipeline.weight_split import WeightSplit
from torch import Tensor, nn

BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}


def gradients(
    module: nn.Module, backward: Callable[[], None], how: str, split: WeightSplit | None = None
) -> dict[str, Tensor | None]:
    """What a backward gives the parameters. `how`: plain or joint, one piece; halves: in I, nothing that can wait."""
    module.zero_grad()
    if how != "halves":
        backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}
    assert split is not None
    with split.collecting() as deferred:
        backward()
    early = {id(p): p.grad for p in module.parameters() if p.grad is not None}
    given: dict[int, Tensor] = {}
    for parameter, gradient in deferred.gradients():
        assert id(parameter) not in given, "a parameter comes once"
        given[id(parameter)] = gradient
    assert deferred.nbytes == 0
    assert not early.keys() & given.keys()
    return {name: (early | given).get(id(p)) for name, p in module.named_parameters()}


def run(module: nn.Module, inputs: list[Tensor], grad: Callable[[Tensor], Tensor], how: str) -> dict[str, Any]:
    """Output, gradients of inputs and of parameters."""
    with ExitStack() as exits:
        split = None if how == "plain" else WeightSplit(module, exits)
        xs = [as_leaf(x) for x in inputs]
        out = module(*xs)
        found: dict[str, Any] = {"out": out.detach().clone()}
        # A copy, as a layer may be at the end, and halves hold the gradient that they were given.
        found |= gradients(module, lambda: out.backward(grad(out)), how, split)
        found |= {f"x{i}": x.grad for i, x in enumerate(xs)}
    assert not any("forward" in vars(m) for m in module.modules())
    return found


def as_leaf(x: Tensor) -> Tensor:
    """With the layout of x, and a gradient if it can have one."""
    leaf = x.detach()
    return leaf.requires_grad_(x.requires_grad)


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Of all that a run found."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is None:
            assert ours[name] is None, name
            continue
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        bits = BITS[value.element_size()]
        assert torch.equal(ours[name].contiguous().view(bits), value.contiguous().view(bits)), name
