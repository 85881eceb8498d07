"""FLOPs of what runs, against those worked out by hand: linear layers, convolutions, attention, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partita.model.flops import FlopCounter, count_flops
from torch import Tensor, nn

BATCH, STEPS, WIDTH = 3, 7, 12
ROWS = BATCH * STEPS
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _lstm_macs(layers: int, directions: int, gates: int = 4, hidden: int = 6) -> int:
    widths = [WIDTH] + [hidden * directions] * (layers - 1)
    return sum(directions * ROWS * gates * hidden * (width + hidden) for width in widths)


def _queries() -> Tensor:
    return _x(BATCH, 4, STEPS, 8)


def _keys(heads: int) -> Tensor:
    return _x(BATCH, heads, 9, 8)


# name: (what runs, multiply-accumulates)
CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "linear": (lambda: nn.Linear(WIDTH, 5)(_x(BATCH, STEPS, WIDTH)), ROWS * WIDTH * 5),
    "linear without a bias": (lambda: nn.Linear(WIDTH, 5, bias=False)(_x(BATCH, WIDTH)), BATCH * WIDTH * 5),
    "functional linear": (lambda: F.linear(_x(2, 8), _x(5, 8)), 2 * 8 * 5),
    "convolution in groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2)(_x(2, 4, 9, 9)), 2 * 81 * 8 * 2 * 9),
    "convolution with a stride": (lambda: nn.Conv1d(4, 8, 3, stride=2)(_x(2, 4, 9)), 2 * 4 * 8 * 4 * 3),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 8, 3)(_x(2, 4, 9)), 2 * 9 * 8 * 4 * 3),
    "embedding": (lambda: nn.Embedding(10, 4)(torch.zeros(3, dtype=torch.long)), 0),
    "norm and activation": (lambda: F.gelu(nn.LayerNorm(WIDTH)(_x(2, WIDTH))), 0),
    "attention": (lambda: F.scaled_dot_product_attention(_queries(), _keys(4), _keys(4)), BATCH * 4 * STEPS * 9 * 16),
    "causal attention": (
        lambda: F.scaled_dot_product_attention(_queries(), _queries(), _queries(), is_causal=True),
        BATCH * 4 * STEPS * STEPS * 16,
    ),
    "attention whose queries share keys": (
        lambda: F.scaled_dot_product_attention(_queries(), _keys(2), _keys(2), enable_gqa=True),
        BATCH * 4 * STEPS * 9 * 16,
    ),
    "attention by hand": (
        lambda: (_queries() @ _keys(4).transpose(-1, -2)).softmax(-1) @ _keys(4),
        BATCH * 4 * STEPS * 9 * 16,
    ),
    "an attention module": (
        lambda: nn.MultiheadAttention(WIDTH, 3, batch_first=True)(*[_x(BATCH, STEPS, WIDTH)] * 3),
        4 * ROWS * WIDTH * WIDTH + 2 * ROWS * STEPS * WIDTH,
    ),
    "LSTM": (lambda: nn.LSTM(WIDTH, 6, batch_first=True)(_x(BATCH, STEPS, WIDTH)), _lstm_macs(1, 1)),
    "LSTM of two layers": (lambda: nn.LSTM(WIDTH, 6, 2)(_x(STEPS, BATCH, WIDTH)), _lstm_macs(2, 1)),
    "LSTM in both directions": (
        lambda: nn.LSTM(WIDTH, 6, 2, bidirectional=True)(_x(STEPS, BATCH, WIDTH)),
        _lstm_macs(2, 2),
    ),
    "GRU": (lambda: nn.GRU(WIDTH, 6)(_x(STEPS, BATCH, WIDTH)), _lstm_macs(1, 1, gates=3)),
    "einsum": (lambda: torch.einsum("btd,bsd->bts", _x(2, 5, 6), _x(2, 4, 6)), 2 * 5 * 4 * 6),
    "a matrix and a vector": (lambda: _x(4, 6) @ _x(6), 4 * 6),
    "a sum of products": (lambda: torch.addbmm(_x(4, 5), _x(3, 4, 6), _x(3, 6, 5)), 3 * 4 * 6 * 5),
    "a product added in place": (lambda: _x(4, 5).addmm_(_x(4, 6), _x(6, 5)), 4 * 6 * 5),
    "products added in place": (lambda: _x(3, 4, 5).baddbmm_(_x(3, 4, 6), _x(3, 6, 5)), 3 * 4 * 6 * 5),
    "a vector added in place": (lambda: _x(4).addmv_(_x(4, 6), _x(6)), 4 * 6),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_forward_has_the_flops_of_its_products(case, mode):
    run, macs = CASES[case]
    with MODES[mode]():
        assert count_flops(run) == 2 * macs


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Linear(WIDTH, 5), (BATCH, WIDTH)), (nn.LSTM(WIDTH, 6), (STEPS, BATCH, WIDTH))]
)
def test_a_backward_has_twice_the_flops_of_its_forward(module, shape):
    x = _x(*shape).requires_grad_()

    def train() -> None:
        outputs = module(x)
        (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()

    assert count_flops(train) == 3 * count_flops(module, x)


def test_backward_of_attention_computes_the_scores_once_more():
    q, k, v = (_queries().requires_grad_() for _ in range(3))
    forward = count_flops(F.scaled_dot_product_attention, q, k, v)
    both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert 2 * both == 7 * forward  # 2 products, and 5


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ torch.ones(2, 3)


@pytest.mark.parametrize("mode", MODES)
def test_what_runs_belongs_to_the_innermost_module(mode):
    model = _Nested()
    with MODES[mode](), FlopCounter(dict(model.named_modules())) as counter:
        model(_x(5, 4))
    found = {name: flops for name, flops in counter.by_module.items() if flops}
    assert found == {"inner.0": 2 * 5 * 4 * 6, "inner.2": 2 * 5 * 6 * 2, "": 2 * 5 * 2 * 3}
    assert counter.total == sum(found.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_raises_is_left():
    model = _Nested()
    with FlopCounter(dict(model.named_modules())) as counter:
        with pytest.raises(RuntimeError):
            model(_x(5, 3))
        torch.ones(2, 3) @ torch.ones(3, 1)
    assert counter.by_module[""] == 2 * 2 * 3
