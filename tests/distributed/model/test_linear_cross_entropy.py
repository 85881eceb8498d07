"""linear_cross_entropy in a model in training: every stage, mapped and gathered, tied heads, and heads of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import partita
import pytest
import torch
import torch.nn.functional as F
from blocks_model import SGD, TRANSPORTS, BlocksModel, assert_same_weights, config_for, error_of, run_steps
from partita.nn.functional import linear_cross_entropy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STAGES = (0, 1, 2, 3)
HEADS = ("tied", "of a block", "checkpointed", "each token")
# Of the weights after three steps of SGD: rounding in 16 bits is that of torch's own products.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 2e-3}


class Chunked(BlocksModel):
    """The loss by chunks of 3 tokens, or from whole logits."""

    def __init__(self, head: str, is_plain: bool = False) -> None:
        super().__init__()
        self.kind, self.is_plain = head, is_plain

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        hidden = self.body(tokens)
        # A block that has computed is released by now, and its weight absent in stage 3.
        weight = self.body.blocks[0].mix.weight if self.kind == "of a block" else self.head.weight
        if self.kind == "checkpointed":
            return checkpoint(self.loss, hidden, weight, targets, use_reentrant=False)  # type: ignore[no-any-return]
        return self.loss(hidden, weight, targets)

    def loss(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        reduction = "none" if self.kind == "each token" else "mean"
        if self.is_plain:
            logits = F.linear(hidden, weight).float().flatten(0, -2)
            return F.cross_entropy(logits, targets.flatten(), reduction=reduction).mean()
        return linear_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_tokens=3).mean()


def make(head: str, is_plain: bool = False) -> Chunked:
    torch.manual_seed(0)
    return Chunked(head, is_plain)


def _outcomes(head: str, over: str, precision: str) -> None:
    """Of all stages: near torch's loss of whole logits, and alike bit for bit."""
    configured = partial(config_for, transport=over, precision=precision, optimizer=SGD)
    losses, weights = run_steps(make(head, is_plain=True), configured(0))
    expected = run_steps(make(head), configured(0))
    for name, value in weights.items():
        error = (value.float() - expected[1][name].float()).abs().max() / value.float().abs().max()
        assert error <= TOLERANCE[precision], f"{name}: {error:.1e}"
    assert expected[0] == pytest.approx(losses, rel=TOLERANCE[precision])
    for stage in STAGES[1:]:
        own = run_steps(make(head), configured(stage))
        assert own[0] == expected[0]
        assert_same_weights(own[1], expected[1], f"in stage {stage}")


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_it_trains_as_whole_logits_do_in_every_stage(ranks, head, over, precision):
    ranks(2).run(_outcomes, head, over, precision)


def _evaluates(over: str) -> None:
    engine = partita.Engine(model=make("tied"), config=config_for(3, over))
    tokens, targets = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        loss = engine(tokens, targets)
    own: Any = engine.module
    message = error_of(lambda: linear_cross_entropy(torch.zeros(2, 7), own.head.weight, targets[:, 0]))
    assert "'body.embed.weight' is used (linear_cross_entropy) while its values are partitioned" in message
    with partita.zero.GatheredParameters(list(own.parameters())):
        hidden = own.body(tokens)
        again = linear_cross_entropy(hidden, own.head.weight, targets)
    torch.testing.assert_close(again, loss)
    engine.destroy()


@pytest.mark.parametrize("over", TRANSPORTS)
def test_outside_of_the_model_the_weight_is_gathered_or_the_error_says_so(ranks, over):
    ranks(2).run(_evaluates, over)
