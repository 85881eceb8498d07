"""Answers of a causal language model to many histories, shared out among ranks, in every ZeRO stage.

What is drawn depends on the weights, the seed and the history; not on the number of ranks, nor on what else is in a
batch but for rounding. Batches are the same for any number of ranks; a rank computes some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import partita
import torch
import torch.distributed as dist
from common.job import JobError
from partita.zero import GatheredParameters
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0: the likeliest token each time."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Answer:
    """Tokens up to and with the one that ends the answer; their mean log-likelihood under the model (temperature 1)."""

    ids: tuple[int, ...]
    likelihood: float


@dataclass(frozen=True)
class Ends:
    """Tokens that end an answer, and the one that fills up rows."""

    eos: tuple[int, ...]
    pad: int


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's tokens with that row's own random numbers, and notes how likely the tokens were.

    As a logits processor of a greedy `generate()`: all but the drawn token become impossible.

    Args:
        seeds: one for each row; None where nothing is drawn (temperature 0).
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[str] | None) -> None:
        self._sampling = sampling
        self._numbers = None if seeds is None else _uniform(seeds, sampling.max_new_tokens)
        self.log_likelihoods: list[Tensor] = []  # for each step [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        if self._sampling.temperature == 0 or self._numbers is None:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            drawn = draw(logits, self._sampling, self._numbers[:, len(self.log_likelihoods)].to(logits.device))
        self.log_likelihoods.append(logits.log_softmax(-1).gather(-1, drawn)[:, 0].cpu())
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def draw(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """[rows, vocabulary] logits and a number from [0, 1) for each row -> [rows, 1] tokens.

    Top-p leaves the likeliest tokens whose probabilities before the last one sum to less than `top_p`.
    """
    probabilities, order = (logits / sampling.temperature).softmax(-1).double().sort(descending=True, stable=True)
    total = probabilities.cumsum(-1)
    probabilities = torch.where(total - probabilities < sampling.top_p, probabilities, 0.0)
    total = probabilities.cumsum(-1)
    place = torch.searchsorted(total, numbers.double()[:, None] * total[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, place.minimum(last))


def _uniform(seeds: Sequence[str], count: int) -> Tensor:
    rows = []
    for seed in seeds:
        number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big") >> 1
        rows.append(torch.rand(count, generator=torch.Generator().manual_seed(number), dtype=torch.float64))
    return torch.stack(rows)


@torch.no_grad()
def answer_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[str] | None,
    sampling: Sampling,
    ends: Ends,
    streamer: Any = None,
) -> list[Answer]:
    """Answers to prompts of any lengths in one `generate()`: padded on the left, with the cache of keys and values.

    Args:
        streamer: of transformers, for one prompt: gets the tokens as they come.
    """
    device, longest = model.device, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), ends.pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, longest - len(prompt) :] = 1
    sampler = Sampler(sampling, seeds)
    greedy = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends.eos),
        pad_token_id=ends.pad,
    )
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=greedy,
        logits_processor=[sampler],
        streamer=streamer,
    )
    new, likelihoods = out[:, longest:].tolist(), torch.stack(sampler.log_likelihoods, 1).tolist()
    return [_up_to_end(row, noted, ends) for row, noted in zip(new, likelihoods, strict=True)]


def _up_to_end(ids: list[int], log_likelihoods: list[float], ends: Ends) -> Answer:
    length = next((i + 1 for i, token in enumerate(ids) if token in ends.eos), len(ids))
    return Answer(tuple(ids[:length]), sum(log_likelihoods[:length]) / length)


def shared_out(
    count: int, size: int, work: Callable[[list[int]], list[T]], order: Sequence[int] | None = None
) -> list[T]:
    """Does `work` on batches of `size` of `count` things, on each rank some; all results on all ranks. A collective.

    Args:
        work: makes a result of each of these things.
        order: in which things are put into batches; None: as they are numbered.

    Raises:
        JobError: `work` raised it on some rank; on all ranks.
    """
    order = range(count) if order is None else order
    batches = [list(order[first : first + size]) for first in range(0, count, size)]
    mine: list[tuple[list[int], list[T]]] | JobError
    try:
        mine = [(batch, work(batch)) for batch in batches[dist.get_rank() :: dist.get_world_size()]]
    except JobError as error:
        mine = error
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine)
    for part in all_ranks:
        if isinstance(part, JobError):
            raise part
    found = {i: result for part in all_ranks for batch, out in part for i, result in zip(batch, out, strict=True)}
    return [found[i] for i in range(count)]


def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[str] | None,
    sampling: Sampling,
    ends: Ends,
    batch_size: int,
) -> list[Answer]:
    """An answer to each prompt, on all ranks. A collective; prompts of a batch have similar lengths."""

    def work(batch: list[int]) -> list[Answer]:
        own = None if seeds is None else [seeds[i] for i in batch]
        return answer_batch(model, [prompts[i] for i in batch], own, sampling, ends)

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return shared_out(len(prompts), batch_size, work, by_length)


# -- the model that answers: a block in which each rank uses it as it likes. All ranks enter and leave together.


@contextmanager
def gathered(engine: partita.Engine) -> Iterator[Any]:
    """The trained model itself, with whole parameters on every rank and in evaluation mode, for the block."""
    was_training = engine.module.training
    with GatheredParameters(engine.module.parameters()):
        engine.module.eval()
        try:
            yield engine.module
        finally:
            engine.module.train(was_training)


@contextmanager
def separate(engine: partita.Engine, twin: Any, bucket_bytes: int) -> Iterator[Any]:
    """A second model on this rank, which takes over the trained weights as the block begins.

    Args:
        twin: a model of the same kind, which nothing else trains.
        bucket_bytes: the most that is under way at once.
    """
    twin.to(engine.module.dtype)
    missing = twin.state_dict()
    for bucket in engine.weights(bucket_bytes=bucket_bytes):
        for name, weight in bucket:
            missing.pop(name).copy_(weight)
    assert not missing, missing.keys()
    yield twin.eval()
