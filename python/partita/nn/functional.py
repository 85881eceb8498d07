"""Functions for models, beside those of `torch.nn.functional`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from partita.nn.head_loss import Head, LossRule, each_loss, summed_loss

__all__ = ["linear_cross_entropy"]

_CALL = "linear_cross_entropy()"
_CHUNK_LOGITS_CPU = 2**23  # elements of a chunk's logits: 32 MiB
_CHUNK_LOGITS_GPU = 2**27  # 512 MiB, as a GPU needs large products to be busy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The cross-entropy of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    It is `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)` to rounding. The logits are made for one
    chunk of tokens at a time. Where gradients are wanted, "mean" and "sum" compute them in the forward already, and
    backward multiplies them by the incoming gradient. They are kept in fp32 until then, so a loss scale takes nothing
    of their precision. What the call needs of memory is the gradient of the weight in fp32 and one chunk of logits.
    "none" computes the logits once more in backward. On a CPU, tokens that are ignored cost nothing.

    Under autocast the product is one of 16 bits, as that of `F.linear`. The parameters may be those of ZeRO stage 3
    wherever the model that has them computes. There is no second derivative.

    Args:
        hidden: [..., width], what the head of a language model gets.
        weight: [words, width], of the head, or of the embedding that is its head, too.
        targets: [...], int64 or int32: 0 <= target < words, or `ignore_index`.
        bias: [words].
        ignore_index: tokens with this target have no loss and no gradient.
        reduction: "mean" over the tokens that are not ignored (NaN if there are none), "sum", or "none": the loss of
            each token, 0 of those that are ignored.
        label_smoothing: the share of a target that all words have evenly.
        logit_softcap: the logits become `logit_softcap * tanh(logits / logit_softcap)`; None: they stay as they are.
        chunk_tokens: tokens of a chunk; None: as many as have 32 MiB of logits (on a GPU 512 MiB).

    Returns:
        The loss in fp32 (fp64 of fp64): a scalar, with "none" of the shape of `targets`.

    Raises:
        ValueError: shapes, dtypes or options do not fit; names the argument. On a CPU also if a target is out of range;
            a GPU asserts that later.
        RuntimeError: in a backward with `create_graph=True`.
    """
    options = _Options(ignore_index, reduction, label_smoothing, logit_softcap, chunk_tokens)
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    if has_torch_function(given):  # an absent parameter of stage 3, which is brought
        return handle_torch_function(linear_cross_entropy, given, hidden, weight, targets, bias, **asdict(options))
    _require_fitting(hidden, weight, targets, bias)
    return _loss(hidden, weight, targets, bias, options)


@dataclass(frozen=True)
class _Options:
    """Those of `linear_cross_entropy`.

    Raises:
        ValueError: one makes no sense.
    """

    ignore_index: int
    reduction: str
    label_smoothing: float
    logit_softcap: float | None
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{_CALL}: reduction = {self.reduction!r}: it is 'mean', 'sum' or 'none'")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{_CALL}: label_smoothing = {self.label_smoothing}: it lies between 0 and 1")
        if self.logit_softcap is not None and not self.logit_softcap > 0:
            raise ValueError(f"{_CALL}: logit_softcap = {self.logit_softcap}: it must be positive, or None")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"{_CALL}: chunk_tokens = {self.chunk_tokens}: it must be at least 1, or None")


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    chunk = options.chunk_tokens or _chunk_tokens(weight)
    rule = LossRule(options.label_smoothing, options.logit_softcap, chunk, _operands(hidden, weight))
    flat, aims = hidden.reshape(-1, weight.shape[1]), targets.reshape(-1).long()
    kept, counts = None, aims != options.ignore_index
    if hidden.device.type == "cpu":  # elsewhere the host would wait for their number
        kept = counts.nonzero().squeeze(1)
        if len(kept) < len(aims):
            flat, aims, counts = (x.index_select(0, kept) for x in (flat, aims, counts))
        _require_in_range(aims, len(weight), options.ignore_index)
    head = Head(flat, weight, bias, aims.where(counts, 0))
    if options.reduction != "none":
        return summed_loss(head, counts, rule, options.reduction == "mean")
    losses = each_loss(head, counts, rule)
    if kept is not None:
        losses = losses.new_zeros(targets.numel()).index_copy(0, kept, losses)
    return losses.view(targets.shape)


def _operands(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which hidden and weight are multiplied."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{_CALL}: hidden is {hidden.dtype} and weight is {weight.dtype}: convert one, or compute "
            "under torch.autocast"
        )
    return hidden.dtype


def _chunk_tokens(weight: Tensor) -> int:
    numel = _CHUNK_LOGITS_GPU if weight.is_cuda else _CHUNK_LOGITS_CPU
    return max(1, numel // max(1, len(weight)))


def _require_fitting(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_CALL}: hidden of shape {list(hidden.shape)} and weight of shape {list(weight.shape)}: "
            "they must be [..., width] and [words, width]"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{_CALL}: targets of shape {list(targets.shape)} for hidden of shape {list(hidden.shape)}: "
            f"there must be one for each token, {list(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_CALL}: bias of shape {list(bias.shape)} for {len(weight)} words: it must be [words]")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{_CALL}: targets are {targets.dtype}: they must be int64 or int32")
    floating = [x for x in (hidden, weight, bias) if x is not None and not x.is_floating_point()]
    if floating:
        raise ValueError(f"{_CALL}: hidden, weight and bias must be floating-point, not {floating[0].dtype}")


def _require_in_range(targets: Tensor, words: int, ignore_index: int) -> None:
    wrong = targets[(targets < 0) | (targets >= words)]
    if len(wrong):
        raise ValueError(
            f"{_CALL}: there is a target {int(wrong[0])}: targets are 0 to {words - 1}, or {ignore_index} "
            "(ignore_index)"
        )
