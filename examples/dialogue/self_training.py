"""Rounds of self-training: candidates are drawn and scored, the best are kept, and trained on beside the data.

[Note: the objective] A step minimizes J = alpha L_data + (1 - alpha) L_gen. Each L is the mean over all its valid
tokens of the step: of all ranks and micro-batches. A micro-batch has rows of both kinds, or of one, or none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import partita
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common.job import JobError
from torch import Tensor

from dialogue.dialogues import History, Message
from dialogue.packing import IGNORED, Batch, Row, Rows, collate, valid_tokens

DATA, GENERATED = "data", "generated"


# -- the feedback set


@dataclass(frozen=True)
class Candidate:
    """An answer to a history with its score."""

    text: str
    score: float


@dataclass(frozen=True)
class Sample:
    """An answer that is kept, as a dialogue that ends with it; `greedy_score`: of the model's likeliest answer."""

    messages: tuple[Message, ...]
    score: float
    greedy_score: float


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The first one of those with the highest score."""
    return max(candidates, key=lambda candidate: candidate.score)


def choose(
    histories: Sequence[History],
    greedy: Sequence[Candidate],
    candidates: Sequence[Sequence[Candidate]],
    *,
    threshold: float,
    better_only: bool,
) -> list[Sample]:
    """The feedback set: of each history the best candidate, if its score is at least `threshold`.

    Args:
        better_only: only where it also beats the greedy answer, so that it is news to the model.
    """
    kept = []
    for history, likeliest, drawn in zip(histories, greedy, candidates, strict=True):
        best = best_of(drawn)
        if best.text.strip() and best.score >= threshold and (best.score > likeliest.score or not better_only):
            messages = (*history.messages, {"role": "assistant", "content": best.text})
            kept.append(Sample(messages, best.score, likeliest.score))
    return kept


def write_feedback(samples: Sequence[Sample], file: Path) -> str:
    """Writes JSON lines that appear complete or not at all; returns their digest."""
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    hidden = file.with_name(f".{file.name}.part")
    with hidden.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    hidden.replace(file)
    return hashlib.sha256(text.encode()).hexdigest()


def read_feedback(file: Path, digest: str) -> list[Sample]:
    """What `write_feedback` wrote.

    Raises:
        JobError: the file is gone, or is another one.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise JobError(f"cannot read the feedback set {file} of the round to go on with: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise JobError(f"the feedback set {file} is not the one that the checkpoint was trained on; put that one back")
    lines = [json.loads(line) for line in data.splitlines()]
    return [Sample(tuple(line["messages"]), line["score"], line["greedy_score"]) for line in lines]


# -- what a step trains on


@dataclass(frozen=True)
class MicroBatch:
    """This rank's rows of a micro-batch, first those of the data, then generated ones."""

    batch: Batch
    data_rows: int


@dataclass(frozen=True)
class StepPlan:
    """This rank's part of a step.

    Attributes:
        micro_batches: as many on every rank.
        tokens: this rank's valid tokens in the step, by kind. Kinds that no rank has are left out.
    """

    micro_batches: tuple[MicroBatch, ...]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class Share:
    """Which part of a step is this rank's."""

    rank: int
    ranks: int
    micro_batches: int

    def of(self, rows: Sequence[Row], micro_batch: int) -> list[Row]:
        """Rows are dealt out one by one: first to each rank's first micro-batch, then to each rank's second one."""
        return list(rows[micro_batch * self.ranks + self.rank :: self.ranks * self.micro_batches])


def plan_step(rows: Mapping[str, Sequence[Row]], share: Share, pad: int, dtype: torch.dtype) -> StepPlan:
    """Divides a step's rows of all ranks, by kind; what all ranks plan from the same rows fits together."""
    micro_batches, tokens = [], dict.fromkeys((kind for kind in rows if valid_tokens(rows[kind])), 0)
    for i in range(share.micro_batches):
        mine = {kind: share.of(rows[kind], i) for kind in tokens}
        for kind in tokens:
            tokens[kind] += valid_tokens(mine[kind])
        data, generated = mine.get(DATA, []), mine.get(GENERATED, [])
        # A rank without rows takes part with one token that counts nowhere.
        micro_batches.append(MicroBatch(collate([*data, *generated] or [()], pad, dtype), len(data)))
    return StepPlan(tuple(micro_batches), tokens)


def rows_of_step(data: Rows, generated: Rows | None, step: int, round_step: int, count: int) -> dict[str, list[Row]]:
    """`count` rows of the data and as many generated ones, but no generated row twice.

    Args:
        step: of the run; the data go on from phase to phase.
        round_step: of the round.
    """
    rows = {DATA: data.take(step * count, count)}
    if generated is not None:
        fewer = min(count, generated.in_an_epoch())
        rows[GENERATED] = generated.take(round_step * fewer, fewer)
    return rows


# -- the objective


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, 0 where the target is IGNORED: [rows, length] float32."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


def objective(
    engine: partita.Engine, losses: Tensor, data_rows: int, tokens: Mapping[str, int], alpha: float
) -> Tensor:
    """A micro-batch's loss of which the step makes the gradient of J, see [Note: the objective]. A collective.

    Args:
        losses: [rows, length], 0 where a token does not count; the first `data_rows` rows are of the data.
        tokens: of `StepPlan`.
        alpha: weight of the data where there are both kinds; a kind that is alone has weight 1.
    """
    sums = {DATA: losses[:data_rows].sum(), GENERATED: losses[data_rows:].sum()}
    weights = {DATA: alpha, GENERATED: 1 - alpha} if len(tokens) == 2 else dict.fromkeys(tokens, 1.0)
    total = losses.sum() * 0.0
    for kind in tokens:
        total = total + weights[kind] * engine.token_mean(sums[kind], tokens[kind])
    return total


def train_step(engine: partita.Engine, plan: StepPlan, alpha: float, totals: Tensor) -> None:
    """One optimizer step.

    Args:
        totals: [4] float64 on the engine's device: summed losses in nats and tokens of the data, then of generated
            answers, over all ranks; the step's are added before it ends, so that a checkpoint after it has them.
    """
    step = torch.zeros_like(totals)
    for number, micro_batch in enumerate(plan.micro_batches, 1):
        batch, data_rows = micro_batch.batch.to(engine.device), micro_batch.data_rows
        losses = token_losses(forward(engine, batch), batch.targets)
        engine.backward(objective(engine, losses, data_rows, plan.tokens, alpha))
        for place, part in ((0, slice(None, data_rows)), (2, slice(data_rows, None))):
            step[place] += losses[part].detach().sum()
            step[place + 1] += (batch.targets[part] != IGNORED).sum()
        if number == len(plan.micro_batches):
            dist.all_reduce(step)
            totals += step
        engine.step()


def forward(model: Any, batch: Batch) -> Tensor:
    """The logits [rows, length, vocabulary] of a Hugging Face causal language model, or of the engine that has it."""
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    logits: Tensor = out.logits
    return logits
