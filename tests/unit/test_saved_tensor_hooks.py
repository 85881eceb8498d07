"""units/saved_tensors.py over a model of one rank: versions, hooks of others, what is left on the stack, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gathered_alone import gathered, two_blocks
from partita.units import AbsentParameterError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def hooks_on_the_stack() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class Changing(nn.Module):
    """Changes what the first layer saved, between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.how = ""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layers[0](x))
        if self.how == "activation":
            h.add_(1)
        elif self.how == "parameter":
            with torch.no_grad():
                self.layers[0].weight.add_(1)  # type: ignore[operator]
        elif self.how == "raises":
            raise OSError("in forward")
        elif self.how == "interrupted":
            raise KeyboardInterrupt
        elif self.how == "torch.func":
            h = torch.vmap(torch.sin)(h)
        return self.layers[1](h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["activation", "parameter"])
def test_what_was_changed_in_place_is_refused_as_by_torch(how):
    """torch compares no versions where there are hooks: a wrong gradient would be the result."""
    for is_gathered in (False, True):
        model = Changing()
        model.how = how
        lifetimes = gathered(model) if is_gathered else None
        x = torch.ones(1, 3, requires_grad=True)
        loss = model(x).sum()
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* at version .*expected version"):
            loss.backward()
        if lifetimes is not None:
            lifetimes.release_all()
            assert lifetimes.gathered_bytes == 0


def test_hooks_around_the_model_get_what_is_no_parameter():
    """`save_on_cpu()` around a forward keeps its activations there, and copies no weights."""
    model = two_blocks()
    x = torch.ones(1, 3, requires_grad=True)
    expected = torch.autograd.grad(model(torch.tanh(x)).sum(), x)[0]
    lifetimes = gathered(model)
    packed: list[Tensor] = []
    unpacked: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked.append(packed[index])
        return packed[index]

    with saved_tensors_hooks(pack, unpack):
        loss = model(torch.tanh(x)).sum()
        outer = hooks_on_the_stack()
    assert outer[0] is pack
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    assert packed
    assert not parameters & {tensor.untyped_storage()._cdata for tensor in packed}
    gradient = torch.autograd.grad(loss, x)[0]
    assert unpacked
    assert torch.equal(gradient, expected)
    assert lifetimes.gathered_bytes == 0


@pytest.mark.parametrize("how", ["", "raises", "interrupted", "torch.func"])
def test_a_forward_leaves_no_hook_behind(how):
    model = Changing()
    model.how = how
    lifetimes = gathered(model)
    try:
        model(torch.ones(1, 3))
    except (OSError, KeyboardInterrupt):
        lifetimes.release_all()  # as the engine does
    assert hooks_on_the_stack() is None
    model.how = ""
    model(torch.ones(1, 3)).sum().backward()
    lifetimes.end_backward()
    assert hooks_on_the_stack() is None
    assert lifetimes.gathered_bytes == 0


def test_what_autograd_saved_is_not_brought_for_a_debugger():
    """Outside of a backward, one rank alone may look at a graph."""
    model = two_blocks()
    lifetimes = gathered(model)
    output = model(torch.ones(1, 3, requires_grad=True))
    with pytest.raises(AbsentParameterError, match="outside of a backward"):
        output.grad_fn._saved_mat2  # noqa: B018
    assert lifetimes.gathered_bytes == 4 * lifetimes.groups[-1].numel


class Into(nn.Linear):
    """Its output is known to nobody; counts how much is gathered in the backward."""

    def forward(self, state: Any) -> Any:
        state[0] = super().forward(state[0])
        if state[0].requires_grad:
            state[0].register_hook(lambda _: self.seen())

    def seen(self) -> None: ...


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Into(4, 4, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        state = [x]
        for layer in self.layers:
            layer(state)
        return state[0]


def test_a_backward_without_hooks_on_outputs_has_few_blocks_at_a_time():
    """The block that was asked for, and the one before it."""
    model = Stack()
    lifetimes = gathered(model)
    most: list[int] = []
    for layer in model.layers:
        layer.seen = lambda: most.append(lifetimes.gathered_bytes)  # type: ignore[method-assign]
    x = torch.ones(2, 4, requires_grad=True)
    loss = model(x).sum()
    assert lifetimes.gathered_bytes == 0
    torch.autograd.grad(loss, x)
    block = 4 * lifetimes.groups[0].numel
    assert len(most) == 8
    assert 0 < max(most) <= 3 * block  # and one that is ahead
    assert lifetimes.gathered_bytes == 0


def test_a_recorded_backward_leaves_its_memory_to_its_graph():
    """The parameters can be released; the graph is valid however late it is used, and the memory goes with it."""
    model = two_blocks()
    x = torch.ones(1, 3, requires_grad=True)

    def second(module: nn.Module) -> Tensor:
        first = torch.autograd.grad(torch.tanh(module(x)).sum(), x, create_graph=True)[0]
        return first.square().sum()

    expected = torch.autograd.grad(second(model), x)[0]
    lifetimes = gathered(model)
    loss = second(model)
    assert lifetimes.gathered_bytes == 0
    for _ in range(2):
        with torch.no_grad():
            model(x)  # takes other memory
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
        assert lifetimes.gathered_bytes == 0
