"""The loss of a language model's head, in chunks of tokens.

[Note: gradients in the forward]
The gradient of a sum of losses is known when the losses are, up to the factor that backward brings. So a chunk of
logits is used for its losses and for its part of the gradients, and forgotten. With d = softmax(logits) - onehot, the
gradient of hidden is d @ weight, and that of the weight d.T @ hidden. Where the operands have 16 bits, d is rounded to
them, as the gradient of the logits would be. But that is before the mean and the loss scale: d is at most 1, and
FP16_SPREAD moves it to where fp16 is most exact. Sums are formed in fp32, and stay there until backward has multiplied
them.

Words are taken in slabs: what is converted between 16 bits and fp32 at a time fits into the caches of a processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

_SLAB_NUMEL_CPU = 2**21  # of a product of 16-bit matrices
_SLAB_NUMEL_GPU = 2**26
_SLABS_IN_PIECE = 8  # of the sum for the weight: memory that goes back to the system when it is freed, piece by piece
_FP16_SPREAD = 2.0**14  # elements of d down to 4e-12 are not 0 then, and the largest are far from overflow


@dataclass(frozen=True)
class LossRule:
    """What is made of logits, and for how many tokens at a time. See `linear_cross_entropy`.

    operands: the dtype in which hidden and weight are multiplied.
    """

    label_smoothing: float
    logit_softcap: float | None
    chunk_tokens: int
    operands: torch.dtype


@dataclass(frozen=True)
class Head:
    """What a head is given: hidden [tokens, width], weight [words, width], bias [words] and targets [tokens]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def wants(self) -> tuple[bool, bool, bool]:
        """Whether gradients of hidden, weight and bias are wanted."""
        if not torch.is_grad_enabled():
            return False, False, False
        return self.hidden.requires_grad, self.weight.requires_grad, self.bias is not None and self.bias.requires_grad


def summed_loss(head: Head, counts: Tensor, rule: LossRule, is_mean: bool) -> Tensor:
    """The sum of the losses of the tokens that count, or their mean; NaN if none does.

    Args:
        counts: bool, [tokens].
    """
    return _SummedLoss.apply(  # type: ignore[no-any-return,no-untyped-call]
        head.hidden, head.weight, head.bias, head.targets, counts, rule, is_mean, head.wants
    )


def each_loss(head: Head, counts: Tensor, rule: LossRule) -> Tensor:
    """The loss of each token, [tokens]; 0 where it does not count."""
    return _EachLoss.apply(  # type: ignore[no-any-return,no-untyped-call]
        head.hidden, head.weight, head.bias, head.targets, counts, rule
    )


class _SummedLoss(Function):
    """See [Note: gradients in the forward]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor,
        rule: LossRule,
        is_mean: bool,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        ctx.gradient_flops = 2 * len(hidden) * weight.numel() * (wants[0] + wants[1])  # of this forward; for who counts
        losses, sums = _walk(Head(hidden, weight, bias, targets), rule, wants, factors=counts)
        number = counts.sum().to(losses.dtype) if is_mean else losses.new_ones(())
        ctx.factor = 1 / (number.clamp(min=1) * _spread(rule.operands))  # gradients of no losses are zeros
        ctx.forms = [_form(x) for x in (hidden, weight, bias)]
        ctx.numbers = list(map(len, sums))
        ctx.save_for_backward(*(piece for pieces in sums for piece in pieces))
        return losses.where(counts, 0).sum() / number

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        pieces = iter(ctx.saved_tensors)
        sums = [[next(pieces) for _ in range(number)] for number in ctx.numbers]
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        return *_finished(sums, grad * ctx.factor, ctx.forms, keeps), *[None] * 5


class _EachLoss(Function):
    """The gradients depend on what backward brings for each token, so backward computes all logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor,
        rule: LossRule,
    ) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(hidden, weight, bias, targets, counts)
        losses, _ = _walk(Head(hidden, weight, bias, targets), rule, (False, False, False), factors=counts)
        return losses.where(counts, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_second()
        hidden, weight, bias, targets, counts = ctx.saved_tensors
        grad = grad.where(counts, 0)
        largest = grad.abs().amax() if len(grad) else grad.new_zeros(())
        factors = grad / largest.where(largest != 0, 1)  # at most 1, whatever the loss scale is
        _, sums = _walk(Head(hidden, weight, bias, targets), ctx.rule, ctx.needs_input_grad[:3], factors)
        forms = [_form(x) for x in (hidden, weight, bias)]
        return *_finished(sums, largest / _spread(ctx.rule.operands), forms, keeps=False), *[None] * 3


def _refuse_second() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy() has no second derivative, which backward(create_graph=True) asks for: use "
            "F.cross_entropy(F.linear(hidden, weight, bias), targets) there"
        )


def _spread(operands: torch.dtype) -> float:
    return _FP16_SPREAD if operands == torch.float16 else 1.0


Form = tuple[torch.Size, torch.dtype]


def _form(like: Tensor | None) -> Form:
    return (torch.Size(), torch.float32) if like is None else (like.shape, like.dtype)


def _finished(
    sums: Sequence[Sequence[Tensor]], factor: Tensor, forms: Sequence[Form], keeps: bool
) -> list[Tensor | None]:
    """The gradients: sums times a factor. Nobody needs the sums afterwards, unless `keeps`; and they are large."""
    gradients: list[Tensor | None] = []
    for pieces, (shape, dtype) in zip(sums, forms, strict=True):
        if not pieces:
            gradients.append(None)
        elif len(pieces) == 1 and not keeps:
            gradients.append(pieces[0].mul_(factor).to(dtype))
        else:
            made = pieces[0].new_empty(shape, dtype=dtype)
            for piece, place in zip(pieces, made.split_with_sizes([len(piece) for piece in pieces]), strict=True):
                place.copy_(piece * factor if keeps else piece.mul_(factor))
                if not keeps:
                    piece.untyped_storage().resize_(0)
            gradients.append(made)
    return gradients


def _walk(
    head: Head, rule: LossRule, wants: Sequence[bool], factors: Tensor
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """The loss of each token, and the gradients of hidden, weight (by slab) and bias; those not wanted are empty.

    The gradients are those of sum(factors * losses), times the spread, in fp32 (fp64 of fp64). Factors are at most 1.
    """
    hidden, weight = head.hidden.to(rule.operands), head.weight.to(rule.operands)
    dtype = torch.promote_types(rule.operands, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    (tokens, width), words = hidden.shape, len(weight)
    slabs = _slabs(words, width, rule.operands, dtype, hidden.is_cuda)
    of_hidden = [hidden.new_zeros(tokens, width, dtype=dtype)] if wants[0] else []
    pieces = _ranges(words, slabs[0].stop * _SLABS_IN_PIECE) if wants[1] else []
    of_weight = [hidden.new_zeros(piece.stop - piece.start, width, dtype=dtype) for piece in pieces]
    of_slabs = [total for piece in of_weight for total in torch.split(piece, slabs[0].stop)]
    of_bias = [hidden.new_zeros(words, dtype=dtype)] if wants[2] else []
    factors = factors.to(dtype) * _spread(rule.operands)
    losses = hidden.new_empty(tokens, dtype=dtype)
    chunk = max(1, min(rule.chunk_tokens, tokens))
    logits = hidden.new_empty(chunk, words, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _ranges(tokens, chunk):
            here = hidden[rows]
            of_chunk = _Chunk(logits[: len(here)], head.targets[rows], rule)
            for slab in slabs:
                _product(of_chunk.logits[:, slab], here, weight[slab].t(), adds=False)
            if bias is not None:
                of_chunk.logits.add_(bias)
            losses[rows] = of_chunk.take_losses(keeps=any(wants))
            slopes = of_chunk.take_slopes(factors[rows]) if any(wants) else of_chunk.logits
            for total in of_bias:
                total.add_(slopes.sum(0))
            for total in of_hidden:
                for slab in slabs:
                    _product(total[rows], slopes[:, slab].to(rule.operands), weight[slab])
            for total, slab in zip(of_slabs, slabs, strict=False):  # not wanted: there are none
                _product(total, slopes[:, slab].to(rule.operands).t(), here)
    return losses, (of_hidden, of_weight, of_bias)


def _ranges(length: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _slabs(words: int, width: int, operands: torch.dtype, sums: torch.dtype, is_gpu: bool) -> list[slice]:
    if operands == sums:  # nothing is converted
        return [slice(0, words)]
    return _ranges(words, max(1, (_SLAB_NUMEL_GPU if is_gpu else _SLAB_NUMEL_CPU) // max(1, width)))


def _product(total: Tensor, a: Tensor, b: Tensor, adds: bool = True) -> None:
    """total = a @ b, or total += a @ b; total is in fp32 where a and b have 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=int(adds))
        return
    if a.is_cuda:
        made = torch.mm(a, b, out_dtype=total.dtype)
    elif a.dtype == torch.bfloat16:  # a processor's own products have 16 bits
        made = torch.mm(a, b)
    else:  # where the sums of fp16 would overflow
        made = torch.mm(a.to(total.dtype), b.to(total.dtype))
    if adds:
        total.add_(made.to(total.dtype))  # not in one: torch's addition of two dtypes is slow
    else:
        total.copy_(made)


class _Chunk:
    """The logits of some tokens, in one buffer that is used for all that is made of them.

    logits: [tokens, words] in fp32 or fp64.
    """

    def __init__(self, logits: Tensor, targets: Tensor, rule: LossRule) -> None:
        self.logits = logits
        self._rule = rule
        self._at_targets = (torch.arange(len(targets), dtype=torch.int64, device=targets.device), targets)
        self._capped: Tensor | None = None  # logits / softcap, after tanh
        self._exp_sums = logits  # by token, once the logits are exp(logits - largest)

    def take_losses(self, keeps: bool) -> Tensor:
        """The losses; the logits are gone. `keeps`: slopes will be asked for."""
        z, rule = self.logits, self._rule
        if rule.logit_softcap is not None:
            z.div_(rule.logit_softcap).tanh_()
            self._capped = z.clone() if keeps else None
            z.mul_(rule.logit_softcap)
        z.sub_(z.amax(1, keepdim=True))
        aimed = z[self._at_targets]
        if rule.label_smoothing:
            aimed = aimed.lerp(z.mean(1), rule.label_smoothing)
        self._exp_sums = z.exp_().sum(1)
        return self._exp_sums.log() - aimed

    def take_slopes(self, factors: Tensor) -> Tensor:
        """The gradient of sum(factors * losses) with respect to the logits, after `take_losses`."""
        z, rule = self.logits, self._rule
        z.mul_((factors / self._exp_sums).unsqueeze(1))
        if rule.label_smoothing:
            z.sub_((factors * (rule.label_smoothing / z.shape[1])).unsqueeze(1))
        z[self._at_targets] -= factors * (1 - rule.label_smoothing)
        if self._capped is not None:
            z.mul_(self._capped.square_().neg_().add_(1))
        return z
