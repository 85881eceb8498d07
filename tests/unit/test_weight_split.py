"""pipeline/weight_split.py: same bits as torch's backward, in one piece and in halves, whatever the layer; hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from halved import assert_same_bits, run
from pairwise import pairwise
from partita.pipeline.weight_split import WeightSplit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda out: random(*out.shape, dtype=out.dtype),
    "reversed strides": lambda out: random(*out.shape[::-1], dtype=out.dtype).permute(*range(out.dim() - 1, -1, -1)),
    "expanded": lambda out: torch.full((), 0.7, dtype=out.dtype).expand(out.shape),
}

# -- the same bits

INPUTS: dict[str, Tensor] = {
    "1-D": random(37),
    "2-D": random(19, 37),
    "3-D": random(5, 7, 37),
    "4-D": random(2, 3, 5, 37),
    "one row": random(1, 37),
    "columns first": random(37, 19).t(),
    "batch second": random(7, 5, 37).transpose(0, 1),
    "features first": random(5, 37, 7).transpose(1, 2),
    "every other row": random(5, 14, 37)[:, ::2],
    "every other feature": random(5, 7, 74)[..., ::2],
    "expanded": random(1, 1, 37).expand(5, 7, 37),
    "columns of one matrix": random(37, 5, 7).permute(1, 2, 0),
}
LINEAR_CASES = list(product(DTYPES, INPUTS, GRADS, (True, False), (True, False)))


def _assert_linear(dtype: torch.dtype, inputs: str, grad: str, bias: bool, needs: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(37, 23, bias=bias, dtype=dtype)
    x = INPUTS[inputs].to(dtype).detach().requires_grad_(needs)
    plain = run(layer, [x], GRADS[grad], "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(layer, [x], GRADS[grad], how), plain)


@pytest.mark.parametrize(("dtype", "inputs", "grad", "bias", "needs"), pairwise(LINEAR_CASES))
def test_a_linear_layer_has_torchs_bits(dtype, inputs, grad, bias, needs):
    _assert_linear(dtype, inputs, grad, bias, needs)


@pytest.mark.slow
def test_a_linear_layer_has_torchs_bits_in_every_case():
    for case in LINEAR_CASES:
        _assert_linear(*case)


@pytest.mark.parametrize("inputs", ("batch second", "features first"))
def test_a_bias_that_torch_adds_by_itself_has_its_own_sum(inputs):
    """Where the input is no view of a matrix, the gradient of the bias is summed over all dimensions at once."""
    _assert_linear(torch.float32, inputs, "reversed strides", bias=True, needs=True)


@pytest.mark.parametrize("shape", ((0, 37), (2, 0, 37), (2, 3, 0)))
def test_an_empty_input_has_torchs_gradients(shape):
    layer, x = nn.Linear(shape[-1], 23), torch.zeros(shape, requires_grad=True)
    plain = run(layer, [x], GRADS["contiguous"], "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(layer, [x], GRADS["contiguous"], how), plain)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "1": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), random(3, 6, 17)),
    "1, same": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding="same"), random(3, 6, 17)),
    "1, valid, groups": (lambda: nn.Conv1d(6, 8, 3, padding="valid", groups=2, bias=False), random(3, 6, 17)),
    "2": (lambda: nn.Conv2d(6, 8, 3, padding=(1, 2)), random(3, 6, 9, 7)),
    "2, channels last": (
        lambda: nn.Conv2d(6, 8, 3, padding=1),
        random(3, 6, 9, 7).to(memory_format=torch.channels_last),
    ),
    "2, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), random(3, 6, 9, 7)),
    "2, patches": (lambda: nn.Conv2d(3, 16, 4, stride=4), random(2, 3, 16, 16)),
    "3": (lambda: nn.Conv3d(4, 5, 2, stride=2, dilation=2), random(2, 4, 6, 7, 5)),
    # These do not wait.
    "1, same, uneven": (lambda: nn.Conv1d(6, 8, 4, dilation=3, padding="same"), random(3, 6, 17)),
    "2, circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), random(3, 6, 9, 7)),
    "2, no batch": (lambda: nn.Conv2d(6, 8, 3), random(6, 9, 7)),
}
CONVOLUTION_CASES = list(product(DTYPES, CONVOLUTIONS, GRADS, (True, False)))


@pytest.mark.parametrize(("dtype", "form", "grad", "needs"), pairwise(CONVOLUTION_CASES))
def test_a_convolution_has_torchs_bits(dtype, form, grad, needs):
    torch.manual_seed(0)
    make, x = CONVOLUTIONS[form]
    layer, x = make().to(dtype), x.to(dtype).detach().requires_grad_(needs)
    plain = run(layer, [x], GRADS[grad], "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(layer, [x], GRADS[grad], how), plain)


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": -3},
    "frequency": {"scale_grad_by_freq": True},
    "largest norm": {"max_norm": 1.0},
    "sparse": {"sparse": True},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("form", EMBEDDINGS)
def test_an_embedding_has_torchs_bits(form, dtype):
    torch.manual_seed(0)
    table = nn.Embedding(11, 7, **EMBEDDINGS[form]).to(dtype)
    x = torch.tensor([[0, 3, 8, 8], [8, 10, 3, 1]])
    found = [run(copy.deepcopy(table), [x], GRADS["contiguous"], how) for how in ("plain", "joint", "halves")]
    assert found[2]["weight"].layout == found[1]["weight"].layout == found[0]["weight"].layout
    for result in found:
        result["weight"] = result["weight"].to_dense()
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((19, 37), (5, 7, 37)))
def test_a_conv1d_of_transformers_has_torchs_bits(shape, dtype):
    layers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer = layers.Conv1D(23, 37).to(dtype)
    x = random(*shape, dtype=dtype).requires_grad_()
    plain = run(layer, [x], GRADS["contiguous"], "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(layer, [x], GRADS["contiguous"], how), plain)


# -- a whole stage


class Stage(nn.Module):
    """Uses one layer three times and a table at both ends; what it does between cannot wait."""

    def __init__(self, checkpoints: str = "none") -> None:
        super().__init__()
        self.table = nn.Embedding(13, 16)
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.table.weight
        self.checkpoints = checkpoints

    def body(self, h: Tensor) -> Tensor:
        inside = self.first(self.norm(h))
        return h + self.second(torch.relu_(inside))  # changes what the layer returned

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for _ in range(3):
            if self.checkpoints == "none":
                h = self.body(h)
            else:
                h = checkpoint(self.body, h, use_reentrant=self.checkpoints == "reentrant")
        return self.head(h)  # type: ignore[no-any-return]


TOKENS = torch.tensor([[0, 3, 8, 8, 1], [8, 12, 3, 1, 0]])


def stage(checkpoints: str = "none", dtype: torch.dtype = torch.float32) -> Stage:
    torch.manual_seed(0)
    return Stage(checkpoints).to(dtype)


@pytest.mark.parametrize("checkpoints", ("none", "reentrant", "not reentrant"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_uses_of_a_weight_count(checkpoints, dtype):
    """Summed in the order of autograd: the same bits, with activation checkpoints too."""
    model = stage(checkpoints, dtype)
    plain = run(model, [TOKENS], GRADS["contiguous"], "plain")
    for how in ("joint", "halves"):
        assert_same_bits(run(model, [TOKENS], GRADS["contiguous"], how), plain)


def test_only_what_waits_is_held():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = random(5, 8).requires_grad_()
    with ExitStack() as exits:
        split = WeightSplit(model, exits)
        with split.collecting() as deferred:
            model(x).backward(random(5, 4))
        # Inputs of 8 and 16 columns, gradients of 16 and 4.
        assert deferred.nbytes == 5 * (8 + 16 + 16 + 4) * 4
        assert [p.grad for p in model.parameters()] == [None] * 4
        held = []
        for _ in deferred.gradients():
            held.append(deferred.nbytes)
        assert held == [5 * (8 + 16) * 4] * 2 + [0] * 2
        assert list(deferred.gradients()) == []


def test_what_waited_is_released_with_its_gradient():
    """Memory is that of what is between I and W, and not of how many micro-batches there were."""
    layers = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))
    inputs: list[weakref.ref[Tensor]] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, x: inputs.append(weakref.ref(x[0])))

    def alive() -> int:
        return sum(ref() is not None for ref in inputs)

    with ExitStack() as exits:
        split = WeightSplit(model, exits)
        for _ in range(4):
            with split.collecting() as deferred:
                model(random(5, 8)).sum().backward()
            counts = [alive()] + [alive() for _ in deferred.gradients()]
            assert counts == [3, 2, 2, 1, 1, 0, 0]


def test_an_input_of_several_layers_is_counted_once():
    q, k = nn.Linear(8, 4), nn.Linear(8, 4)
    model = nn.ModuleList([q, k])
    x = random(5, 8).requires_grad_()
    with ExitStack() as exits, WeightSplit(model, exits).collecting() as deferred:
        (q(x) * k(x)).sum().backward()
    assert deferred.nbytes == 5 * (8 + 4 + 4) * 4


def test_backwards_of_several_micro_batches_wait_side_by_side():
    model = stage()
    with ExitStack() as exits:
        split = WeightSplit(model, exits)
        outs = [model(TOKENS.roll(i, 1)) for i in range(3)]
        collected = []
        for out in outs:
            with split.collecting() as deferred:
                out.square().sum().backward()
            collected.append(deferred)
        found = [{id(p): g for p, g in deferred.gradients()} for deferred in collected]
    for i in range(3):
        model.zero_grad()
        model(TOKENS.roll(i, 1)).square().sum().backward()
        for parameter in (model.first.weight, model.second.bias, model.table.weight):
            assert torch.equal(found[i][id(parameter)], parameter.grad)


# -- hooks


def test_hooks_of_modules_see_what_they_always_see():
    def watched(how: str) -> list[Any]:
        model, seen = stage(), []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, x, name=name: seen.append((name, "pre", x[0].detach().clone())))
            module.register_forward_hook(lambda _, x, y, name=name: seen.append((name, "out", y.detach().clone())))
            if name not in ("", "table"):  # which has an input without a gradient
                module.register_full_backward_hook(
                    lambda _, gx, gy, name=name: seen.append((name, "grad", gx[0].clone(), gy[0].clone()))
                )
        # A full backward hook forbids changes in place, so without them here.
        model.body = lambda h: h + model.second(torch.relu(model.first(model.norm(h))))
        run(model, [TOKENS], GRADS["contiguous"], how)
        return seen

    plain = watched("plain")
    assert {entry[1] for entry in plain} == {"pre", "out", "grad"}
    for how in ("joint", "halves"):
        for ours, theirs in zip(watched(how), plain, strict=True):
            assert ours[:2] == theirs[:2]
            assert all(map(torch.equal, ours[2:], theirs[2:]))


@pytest.mark.parametrize("kind", ("tensor", "post"))
@pytest.mark.parametrize("which", ("weight", "bias"))
def test_a_parameter_with_hooks_does_not_wait(kind, which):
    layer, seen = nn.Linear(8, 4), []
    parameter = getattr(layer, which)
    if kind == "tensor":
        parameter.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    else:
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = random(5, 8).requires_grad_()
    plain = run(layer, [x], GRADS["contiguous"], "plain")
    ours = run(layer, [x], GRADS["contiguous"], "halves")
    assert_same_bits(ours, plain)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
