"""What finetune_chat.py does with a model that is not training at the moment: measures it, and draws answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dialogue.dialogues import Encoded, History
from dialogue.generation import Answer, Ends, Sampling, answers, shared_out
from dialogue.packing import Arrangement, collate, valid_tokens
from dialogue.scores import Score, token_f1
from dialogue.self_training import Candidate, Sample, choose, forward, token_losses


@dataclass(frozen=True)
class Asking:
    """How the model is asked: the tokenizer's side of it.

    Attributes:
        tokenizer: turns answers into text.
        batch_size: answers that a rank generates at once, rows that it measures at once.
    """

    tokenizer: Any
    ends: Ends
    max_new_tokens: int
    batch_size: int

    def text(self, answer: Answer) -> str:
        return str(self.tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()

    def greedy(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[str, float]]:
        """The likeliest answers (token by token) with their likelihoods, on all ranks. A collective."""
        return self._ask(model, prompts, None, Sampling(self.max_new_tokens))

    def drawn(
        self, model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[str], temperature: float, top_p: float
    ) -> list[tuple[str, float]]:
        """An answer for each prompt and its seed, on all ranks. A collective."""
        return self._ask(model, prompts, seeds, Sampling(self.max_new_tokens, temperature, top_p))

    def _ask(
        self, model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[str] | None, sampling: Sampling
    ) -> list[tuple[str, float]]:
        found = answers(model, prompts, seeds, sampling, self.ends, self.batch_size)
        return [(self.text(answer), answer.likelihood) for answer in found]


@dataclass(frozen=True)
class Trial:
    """Held-out dialogues; `prompts` are those of `histories`."""

    dialogues: list[Encoded]
    histories: list[History]
    prompts: list[tuple[int, ...]]


@torch.no_grad()
def perplexity(model: Any, dialogues: Sequence[Encoded], asking: Asking, arrangement: Arrangement) -> float:
    """Of the assistant's tokens in these dialogues. A collective; the same bits for any number of ranks."""
    rows = arrangement.rows(dialogues)

    def work(batch: list[int]) -> list[float]:
        rows_here = collate([rows[i] for i in batch], asking.ends.pad, model.dtype).to(model.device)
        return token_losses(forward(model, rows_here), rows_here.targets).double().sum(1).tolist()

    return math.exp(sum(shared_out(len(rows), 16, work)) / valid_tokens(rows))


@dataclass(frozen=True)
class Drawing:
    """How a round draws answers and which it keeps."""

    candidates: int
    temperature: float
    top_p: float
    score: Score
    threshold: float
    better_only: bool


@dataclass(frozen=True)
class Drawn:
    """The feedback set, and mean scores of all answers that were looked at."""

    samples: list[Sample]
    histories: int
    score_drawn: float
    score_greedy: float


def _draw(
    model: Any, prompts: Sequence[Sequence[int]], seed: str, how: Drawing, asking: Asking
) -> list[list[tuple[str, float]]]:
    """`how.candidates` answers to each prompt with their likelihoods, on all ranks. A collective."""
    k = how.candidates
    seeds = [f"{seed}/{i // k}/{i % k}" for i in range(k * len(prompts))]
    drawn = asking.drawn(model, [prompts[i // k] for i in range(len(seeds))], seeds, how.temperature, how.top_p)
    return [drawn[k * i : k * i + k] for i in range(len(prompts))]


def _score(
    histories: Sequence[History], answers: Sequence[Sequence[tuple[str, float]]], score: Score
) -> list[list[Candidate]]:
    """Candidates from answers to each history. A collective."""

    def work(batch: list[int]) -> list[list[Candidate]]:
        return [
            [Candidate(text, score(histories[i], text, likelihood)) for text, likelihood in answers[i]] for i in batch
        ]

    return shared_out(len(histories), 16, work)


def draw_feedback(
    model: Any, histories: Sequence[History], prompts: Sequence[Sequence[int]], seed: str, how: Drawing, asking: Asking
) -> Drawn:
    """Draws `how.candidates` answers to each history and keeps the best. A collective.

    Args:
        prompts: of the histories.
        seed: of the round; each answer has one of its own, made from it.
    """
    drawn = _draw(model, prompts, seed, how, asking)
    likeliest = asking.greedy(model, prompts)
    scored = _score(histories, [[first, *others] for first, others in zip(likeliest, drawn, strict=True)], how.score)
    greedy, candidates = [own[0] for own in scored], [own[1:] for own in scored]
    return Drawn(
        choose(histories, greedy, candidates, threshold=how.threshold, better_only=how.better_only),
        len(histories),
        _mean([candidate.score for own in candidates for candidate in own]),
        _mean([candidate.score for candidate in greedy]),
    )


@dataclass(frozen=True)
class Measured:
    """Of held-out dialogues.

    Attributes:
        token_f1: mean over the greedy answers, which are `texts`.
        score: mean over all drawn answers, which have the same random numbers in each measurement.
    """

    perplexity: float
    token_f1: float
    score: float
    texts: list[str]


def measure(model: Any, trial: Trial, how: Drawing, asking: Asking, arrangement: Arrangement) -> Measured:
    """How well the model does on held-out dialogues. A collective."""
    texts = [text for text, _ in asking.greedy(model, trial.prompts)]
    scores = [token_f1(text, history.references) for text, history in zip(texts, trial.histories, strict=True)]
    drawn = _score(trial.histories, _draw(model, trial.prompts, "held-out", how, asking), how.score)
    return Measured(
        perplexity(model, trial.dialogues, asking, arrangement),
        _mean(scores),
        _mean([candidate.score for own in drawn for candidate in own]),
        texts,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
