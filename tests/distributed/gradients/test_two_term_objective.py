"""J = alpha L_data + (1 - alpha) L_gen of the chat example: a step's gradient is that of the plain formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import partita
import pytest
import torch
import torch.nn.functional as F
from dialogue.dialogues import Encoded
from dialogue.packing import IGNORED, Row, collate
from dialogue.self_training import DATA, GENERATED, Share, forward, plan_step, train_step
from support import base_config
from torch import Tensor

transformers = pytest.importorskip("transformers")

ALPHA = 0.3
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
# Rows of a step by kind, as lengths of their dialogues: unequal numbers of tokens in every micro-batch and rank.
STEPS: dict[str, dict[str, list[list[int]]]] = {
    "both kinds everywhere": {DATA: [[9, 5], [4], [12], [3, 3, 3]], GENERATED: [[5], [11], [4, 4], [7]]},
    "a rank without generated rows": {DATA: [[9], [4, 6], [12], [5]], GENERATED: [[8, 3]]},
    "no generated rows": {DATA: [[9], [4, 6], [12], [5]]},
    "ranks without any rows": {DATA: [[6]], GENERATED: [[9]]},
    "rows without valid tokens": {DATA: [[9], [2], [1], [2]], GENERATED: [[2], [2]]},
}


def model() -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 29, "max_position_embeddings": 16}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **sizes))


def rows_of(name: str) -> dict[str, list[Row]]:
    """All but the first two tokens of each dialogue are answers."""
    generator = torch.Generator().manual_seed(1)

    def dialogue(length: int) -> Encoded:
        ids = tuple(torch.randint(0, 29, (length,), generator=generator).tolist())
        return Encoded(ids, tuple(i >= 2 for i in range(length)))

    return {kind: [tuple(map(dialogue, row)) for row in rows] for kind, rows in STEPS[name].items()}


def plain_mean(net: Any, rows: Sequence[Row]) -> Tensor:
    """The mean over all valid tokens of these rows, each dialogue by itself."""
    losses = []
    for dialogue in (dialogue for row in rows for dialogue in row):
        batch = collate([(dialogue,)], pad=0)
        flat = forward(net, batch).flatten(0, 1)
        losses.append(F.cross_entropy(flat, batch.targets.flatten(), ignore_index=IGNORED, reduction="none"))
    targets = [sum(dialogue.answers[1:]) for row in rows for dialogue in row]
    return torch.cat(losses).sum() / sum(targets)


def plain_gradients(name: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    net, rows = model(), rows_of(name)
    means = {kind: plain_mean(net, own) for kind, own in rows.items() if any(len(d.ids) > 2 for r in own for d in r)}
    both = len(means) == 2
    loss = ALPHA * means[DATA] + (1 - ALPHA) * means[GENERATED] if both else means[DATA]
    loss.backward()
    return {n: p.grad for n, p in net.named_parameters()}, {kind: mean.item() for kind, mean in means.items()}


def _step(name: str, stage: int, accumulation: int) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients, as a step of SGD with learning rate 1 shows them; the totals."""
    net = model()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = {"type": "SGD", "params": {"lr": 1.0}}
    config = base_config(stage=stage, gradient_accumulation_steps=accumulation, optimizer=optimizer)
    engine = partita.Engine(model=net, config=config)
    share = Share(engine.global_rank, engine.world_size, accumulation)
    totals = torch.zeros(4, dtype=torch.float64)
    train_step(engine, plan_step(rows_of(name), share, pad=0, dtype=torch.float32), ALPHA, totals)
    after = engine.module_state_dict()
    engine.destroy()
    return {n: before[n] - after[n] for n in before}, totals.tolist()


@pytest.mark.pairwise
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", STEPS)
def test_the_gradient_is_that_of_the_plain_formula(ranks, name, stage, accumulation):
    """On two ranks, with several micro-batches, unequal numbers of tokens, and ranks that lack a kind."""
    expected, means = plain_gradients(name)
    for gradients, totals in ranks(2).run(_step, name, stage, accumulation):
        for parameter, value in expected.items():
            torch.testing.assert_close(gradients[parameter], value, rtol=1e-4, atol=1e-6)
        found = {DATA: totals[0] / totals[1], GENERATED: totals[2] / totals[3] if totals[3] else 0.0}
        for kind, mean in means.items():
            assert found[kind] == pytest.approx(mean, rel=1e-5)
