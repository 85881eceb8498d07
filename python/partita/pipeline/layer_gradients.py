"""The layers whose weight gradients can wait: their forwards and gradients, with the very operations of torch's own.

Each rule names the operations that torch itself runs, on tensors of the same layout, so that outputs and gradients are
the same bits. The gradients of a rule are differentiable where torch's are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted = tuple[bool, bool, bool]


class Rule(Protocol):
    """One layer with its settings, applied to one kind of input."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """The gradients of x, weight and bias from that of the output; None for those that are not wanted."""


@dataclass(frozen=True)
class Affine:
    """x @ weight + bias over the last dimension of x. is_transposed: weight has the shape (outputs, inputs)."""

    is_transposed: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (*, inputs) -> (*, outputs)."""
        matrix = weight.t() if self.is_transposed else weight
        rows = _rows(x)
        is_fused = bias is not None and not self._adds_last(x)
        out = torch.addmm(bias, rows, matrix) if is_fused and bias is not None else torch.mm(rows, matrix)
        if x.dim() != 2:
            # Not a view of autograd's, so that it may be changed in place.
            out = torch.ops.aten._unsafe_view.default(out, (*x.shape[:-1], matrix.shape[1]))
        return out if is_fused or bias is None else out + bias

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """See `Rule`."""
        matrix = weight.t() if self.is_transposed else weight
        rows, grads = _rows(x), _rows(grad)
        of_x = of_weight = of_bias = None
        if wanted[0]:
            of_x = torch.mm(matrix, grads.t()).t() if _is_column_major(rows) else torch.mm(grads, matrix.t())
            of_x = of_x.view(x.shape)
        if wanted[1]:
            of_weight = torch.mm(grads.t(), rows).t() if _is_column_major(matrix) else torch.mm(rows.t(), grads)
            of_weight = of_weight.t() if self.is_transposed else of_weight
        if wanted[2]:
            summed = grad.sum(list(range(grad.dim() - 1)), True) if self._adds_last(x) else grads.sum([0], True)
            of_bias = summed.view(-1)
        return of_x, of_weight, of_bias

    def _adds_last(self, x: Tensor) -> bool:
        """Whether torch adds the bias in an operation of its own: `linear` does where x has no view as a matrix."""
        return self.is_transposed and x.dim() > 2 and not x.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _is_column_major(matrix: Tensor) -> bool:
    """Whether autograd computes the gradient of this factor transposed, as it keeps the factor's layout."""
    return matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]


@dataclass(frozen=True)
class Convolution:
    """A convolution over a batch, padded with zeros on both sides alike."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shape (batch, channels, *) -> (batch, channels, *)."""
        zeros = [0] * len(self.stride)
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """See `Rule`."""
        bias, zeros = [weight.shape[0]] if wanted[2] else None, [0] * len(self.stride)
        form = (self.stride, self.padding, self.dilation, False, zeros, self.groups)
        gradients: Gradients = torch.ops.aten.convolution_backward(grad, x, weight, bias, *form, list(wanted))
        return gradients


@dataclass(frozen=True)
class Lookup:
    """An embedding. padding_index: of the row that gets no gradient; -1: none."""

    padding_index: int
    scales_by_frequency: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Indices of shape (*) -> (*, columns of weight)."""
        return torch.embedding(weight, x, self.padding_index, self.scales_by_frequency, False)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Wanted) -> Gradients:
        """See `Rule`."""
        form = (weight.shape[0], self.padding_index, self.scales_by_frequency)
        return None, torch.ops.aten.embedding_dense_backward(grad, x, *form) if wanted[1] else None, None


LINEAR, CONV1D = Affine(is_transposed=True), Affine(is_transposed=False)
Choice = Callable[[Any, Tensor, Tensor], Rule | None]  # (module, x, weight) -> the rule, if one holds for this input


def _linear(module: nn.Linear, x: Tensor, weight: Tensor) -> Rule | None:
    return LINEAR if x.dim() > 0 and x.numel() > 0 else None


def _transformers_conv1d(module: nn.Module, x: Tensor, weight: Tensor) -> Rule | None:
    return CONV1D if x.numel() > 0 and (x.dim() == 2 or x.is_contiguous()) else None


def _convolution(module: Any, x: Tensor, weight: Tensor) -> Rule | None:
    own = getattr(type(module), "_conv_forward", None)
    is_plain = own in _CONV_FORWARDS and module.padding_mode == "zeros"
    if not is_plain or x.dim() != weight.dim():
        return None
    padding = module.padding
    if isinstance(padding, str):
        sizes = zip(module.dilation, module.kernel_size, strict=True)
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in sizes]
        if any(total % 2 for total in totals):
            return None
        padding = tuple(total // 2 for total in totals)
    return Convolution(module.stride, padding, module.dilation, module.groups)


def _lookup(module: nn.Embedding, x: Tensor, weight: Tensor) -> Rule | None:
    if module.sparse or module.max_norm is not None:
        return None
    padding = -1 if module.padding_idx is None else module.padding_idx
    return Lookup(padding, module.scale_grad_by_freq)


_CONV_FORWARDS = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_CHOICES: dict[Any, tuple[Choice, tuple[str, ...]]] = {
    nn.Linear.forward: (_linear, ("weight", "bias")),
    nn.Conv1d.forward: (_convolution, ("weight", "bias")),
    nn.Conv2d.forward: (_convolution, ("weight", "bias")),
    nn.Conv3d.forward: (_convolution, ("weight", "bias")),
    nn.Embedding.forward: (_lookup, ("weight",)),
}


def choice_for(module: nn.Module) -> tuple[Choice, tuple[str, ...]] | None:
    """How to choose the rule of a module for an input, and the names of the module's parameters.

    None for modules of other kinds, and for those whose forward is not that of their kind. `Conv1D` of transformers is
    known where the program has imported it.
    """
    forward = getattr(module.forward, "__func__", None)
    hugging_face = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if hugging_face is not None and forward is hugging_face.forward:
        return _transformers_conv1d, ("weight", "bias")
    return _CHOICES.get(forward)
