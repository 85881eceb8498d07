"""pipeline/weight_split.py: what does not wait, copies of split modules, and how a module is left."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from halved import assert_same_bits, run
from partita.pipeline.weight_split import WeightSplit
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
GRAD = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


def parametrised(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def spectral(layer: nn.Linear) -> None:
    parametrizations.spectral_norm(layer)  # each look at the weight changes it


def bent_bias(layer: nn.Linear) -> None:
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())


def pruned(layer: nn.Linear) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


def frozen(layer: nn.Linear) -> None:
    layer.weight.requires_grad_(False)


def frozen_bias(layer: nn.Linear) -> None:
    layer.bias.requires_grad_(False)


def own_gradient_dtype(layer: nn.Linear) -> None:
    layer.weight.grad_dtype = torch.float64  # type: ignore[attr-defined]


def transposed_memory(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.t().contiguous().t()


class Doubling(nn.Parameter):
    """Doubles what comes of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out if func is torch.nn.functional.linear else out


def doubling(layer: nn.Linear) -> None:
    layer.weight = Doubling(layer.weight.detach())


CHANGES = (
    parametrised,
    spectral,
    bent_bias,
    pruned,
    frozen,
    frozen_bias,
    own_gradient_dtype,
    transposed_memory,
    doubling,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_other_weights_are_as_before(change):
    def made() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        change(layer)
        return layer

    plain = run(made(), [X.detach().requires_grad_()], lambda _: GRAD, "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(made(), [X.detach().requires_grad_()], lambda _: GRAD, how), plain)


class Halved(nn.Linear):
    """Another forward than that of its kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_a_class_with_another_forward_is_as_before():
    layer = Halved(8, 8)
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        assert "forward" not in vars(layer)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    layer = nn.Linear(8, 8)
    own = layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        assert layer.forward is own
    assert layer.forward is own


def test_a_forward_that_another_gave_the_layer_since_stays():
    layer = nn.Linear(8, 8)
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        other = layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert layer.forward is other


def test_autocast_is_as_before():
    layer = nn.Linear(8, 8)
    with ExitStack() as exits:
        split = WeightSplit(layer, exits)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(X)
        assert out.dtype == torch.bfloat16
        with split.collecting() as deferred:
            out.sum().backward()
    assert list(deferred.gradients()) == [] and layer.weight.grad is not None


# What a program does with one split layer while its gradients are collected.
def returned(layer: nn.Module, x: Tensor) -> Any:
    """The gradients of a weight are asked for, and not added."""
    return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])


def returned_for_inputs(layer: nn.Module, x: Tensor) -> Any:
    return torch.autograd.grad(layer(x).square().sum(), [x])


def some_inputs(layer: nn.Module, x: Tensor) -> Any:
    torch.autograd.backward(layer(x).square().sum(), inputs=[x])
    return [x.grad, *(p.grad for p in layer.parameters())]


def functional(layer: nn.Module, x: Tensor) -> Any:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: E731
    return list(torch.func.grad(loss)(parameters).values())


def swapped(layer: nn.Module, x: Tensor) -> Any:
    """Other tensors in the place of the parameters."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, parameters, (x,)).square().sum().backward()
    return [x.grad, *(p.grad for p in parameters.values())]


def swapped_bias(layer: nn.Module, x: Tensor) -> Any:
    bias = torch.ones(8, requires_grad=True)
    torch.func.functional_call(layer, {"bias": 2 * bias}, (x,)).square().sum().backward()
    return [x.grad, bias.grad]


def graphed(layer: nn.Module, x: Tensor) -> Any:
    """Gradients that have gradients."""
    layer(x).square().sum().backward(create_graph=True)
    grads = [x.grad, *(p.grad for p in layer.parameters())]
    for p in (x, *layer.parameters()):
        p.grad = None  # which held itself alive
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads if g is not None), x)]


class Cut(torch.autograd.Function):
    """No gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        return None


def cut(layer: nn.Module, x: Tensor) -> Any:
    """Nothing is not zeros."""
    (Cut.apply(layer(x)).sum() + x.sum()).backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def mapped(layer: nn.Module, x: Tensor) -> Any:
    torch.vmap(layer)(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def tangents(layer: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, GRAD))))


def by_name(layer: nn.Module, x: Tensor) -> Any:
    layer(input=x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def without_gradients(layer: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        out = layer(x)
    with torch.inference_mode():
        return [out, layer(x).clone()]


def traced(layer: nn.Module, x: Tensor) -> Any:
    torch.jit.trace(layer, (x,))(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def compiled(layer: nn.Module, x: Tensor) -> Any:
    torch.compile(layer, backend="eager", fullgraph=True)(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


USES = (
    returned,
    returned_for_inputs,
    some_inputs,
    functional,
    swapped,
    swapped_bias,
    graphed,
    cut,
    mapped,
    tangents,
    by_name,
    without_gradients,
    traced,
    compiled,
)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("collects", (True, False))
@pytest.mark.parametrize("use", USES, ids=lambda u: u.__name__)
def test_other_uses_are_as_before(use, collects):
    """Nothing waits that nobody would add, and what torch can do with the layer it still can."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    plain = use(layer, X.detach().clone().requires_grad_())
    layer.zero_grad()
    with ExitStack() as exits:
        split = WeightSplit(layer, exits)
        deferred = exits.enter_context(split.collecting()) if collects else None
        ours = use(layer, X.detach().clone().requires_grad_())
        assert deferred is None or list(deferred.gradients()) == []
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("make", (lambda: nn.Linear(8, 8), lambda: nn.Conv1d(5, 8, 3), lambda: nn.Embedding(9, 8)))
def test_second_derivatives_of_every_kind(make):
    """`create_graph` through a joint backward of ours."""

    def penalty(layer: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.tensor([0, 3, 3]) if isinstance(layer, nn.Embedding) else X.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), [layer.weight], create_graph=True)  # type: ignore[list-item]
        first.square().sum().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    layer = make()
    plain = penalty(layer)
    layer.zero_grad()
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        ours = penalty(layer)
    assert ours and all(map(torch.equal, ours, plain))


def test_a_penalty_waits_in_part():
    """Of a gradient's gradient, what comes through the forward waits; what comes through the backward is there."""

    def penalise(layer: nn.Module) -> dict[int, Tensor]:
        (first,) = torch.autograd.grad(layer(x).square().sum(), [x], create_graph=True)
        first.square().sum().backward()
        return {id(p): p.grad for p in layer.parameters() if p.grad is not None}

    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), X.detach().clone().requires_grad_()
    plain = penalise(layer)
    layer.zero_grad()
    with ExitStack() as exits:
        split = WeightSplit(layer, exits)
        with split.collecting() as deferred:
            ours = penalise(layer)
        for parameter, gradient in deferred.gradients():
            ours[id(parameter)] = gradient + ours.get(id(parameter), torch.zeros_like(gradient))
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value)


# -- errors


def test_what_torch_refuses_is_refused_in_its_words():
    layer = nn.Linear(8, 8)
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        for wrong in (torch.randn(4, 4), torch.randn(5, 8, dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                layer(wrong)
        with pytest.raises(TypeError):
            layer()


def test_a_weight_that_was_changed_since_its_forward_is_refused():
    layer, x = nn.Linear(8, 8), X.detach().clone().requires_grad_()
    with ExitStack() as exits:
        WeightSplit(layer, exits)
        out = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_one_backward_is_collected_at_a_time():
    layer = nn.Linear(8, 8)
    with ExitStack() as exits:
        split = WeightSplit(layer, exits)
        with split.collecting(), pytest.raises(RuntimeError, match="collected already"), split.collecting():
            pass
        with pytest.raises(OSError), split.collecting():
            raise OSError
        with split.collecting() as deferred:
            layer(X).sum().backward()
        assert deferred.nbytes


# -- copies


def unpickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("way", (copy.deepcopy, unpickled, saved))
def test_a_copy_belongs_to_nobody(way: Callable[[nn.Module], nn.Module]):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    with ExitStack() as exits:
        split = WeightSplit(model, exits)
        copied = way(way(model))
        with split.collecting() as deferred:
            copied(X).sum().backward()
        assert deferred.nbytes == 0
        assert torch.equal(copied(X), model(X))
    assert all(p.grad is not None for p in copied.parameters())
    with ExitStack() as exits:  # and may be split itself
        split = WeightSplit(copied, exits)
        with split.collecting() as deferred:
            copied(X).sum().backward()
        assert len(list(deferred.gradients())) == 4


def test_an_input_that_changes_while_its_weight_waits_is_named():
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    with ExitStack() as exits:
        split = WeightSplit(layer, exits)
        out = layer(x)
        with split.collecting() as deferred:
            out.sum().backward()
        x.add_(1.0)  # a buffer of a module, say, that the forward of the next micro-batch changes
        with pytest.raises(RuntimeError, match=r"weight of shape \(2, 3\).*was changed in place"):
            list(deferred.gradients())
