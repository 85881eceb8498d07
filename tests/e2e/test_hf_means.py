"""Trainer's means over tokens and samples: two ranks train as one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_subjects import (
    Subject,
    arguments,
    close,
    close_weights,
    job,
    logged,
    model_of,
    on_ranks,
    pad,
    texts,
    whole_weights,
)
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

UNEVEN = {"accelerator_config": {"even_batches": False}}
MEAN_OF_RANKS = {"average_tokens_across_devices": False}


class Regression(nn.Module):
    """Knows nothing of `num_items_in_batch`: the mean of its losses is over micro-batches and ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        guess = self.inner(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(guess, labels), "logits": guess}


def points(count: int) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(7, generator=source), "labels": torch.randn((), generator=source)} for _ in range(count)]


def outcome_of(trainer: Any) -> dict[str, Any]:
    """Trains and evaluates; losses, norms and learning rates by step, the evaluation's numbers, the weights."""
    trainer.train()
    shown = logged(trainer, "loss")
    assert len(shown) == trainer.state.global_step
    predicted = trainer.predict(trainer.eval_dataset)
    return {
        "loss": shown,
        "norm": logged(trainer, "grad_norm"),
        "rate": logged(trainer, "learning_rate"),
        "eval": [predicted.metrics["test_loss"], *predicted.predictions.reshape(-1)],
        "samples": len(predicted.predictions),
        "weights": whole_weights(trainer),
    }


def of_tokens(subject: Subject, folder: str, in_step: int, accumulation: int, changes: Any) -> dict[str, Any]:
    """Two epochs over 19 ragged texts; the last batch of an epoch is smaller on the last rank."""
    with job():
        size = in_step // accumulation // dist.get_world_size()
        given = arguments(
            folder,
            num_train_epochs=2,
            max_grad_norm=0.9,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **changes,
        )
        trainer = subject.trainer(
            transformers.Trainer,
            model_of("llama"),
            given,
            train_dataset=texts(19),
            # Without padded batches, ranks must have equal numbers of batches in evaluation.
            eval_dataset=texts(8 if "accelerator_config" in changes else 5, seed=8, lengths=(6, 7)),
            data_collator=pad,
        )
        return outcome_of(trainer)


def of_samples(subject: Subject, folder: str) -> dict[str, Any]:
    """Three epochs over 11 points: a step of one micro-batch ends each, and one rank's share of it is padded."""
    with job():
        given = arguments(folder, num_train_epochs=3, gradient_accumulation_steps=2)
        data = {"train_dataset": points(11), "eval_dataset": points(7)}
        return outcome_of(subject.trainer(transformers.Trainer, Regression(), given, **data))


def assert_same(actual: dict[str, Any], expected: dict[str, Any], *names: str) -> None:
    for name in names or ("loss", "norm", "eval"):
        close(actual[name], expected[name])
    assert actual["rate"] == expected["rate"]
    assert actual["samples"] == expected["samples"]
    close_weights(actual["weights"], expected["weights"])


@on_ranks(2, alias=True, quick=True)
def test_ragged_texts_on_two_ranks_train_as_one_whole_batch(ranks, ranks_of, tmp_path, world_size, subject):
    """G6: with micro-batches and ranks of unequal numbers of tokens, the mean is over the tokens of the step."""
    whole = ranks(1).run(of_tokens, Subject(), str(tmp_path), 8, 1, UNEVEN)[0]
    for result in ranks_of(subject, world_size).run(two_ranks, subject, str(tmp_path), UNEVEN):
        assert_same(result, whole)


def two_ranks(subject: Subject, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    return of_tokens(subject, folder, 8, 2, changes)


@on_ranks(1, 2, alias=True)
def test_other_means_are_those_of_trainer_alone(ranks, ranks_of, tmp_path, subject, world_size):
    """Padded last batches; the mean of ranks' own means; a model that takes no number of items."""
    for run, *args in ((two_ranks, {}), (two_ranks, UNEVEN | MEAN_OF_RANKS), (of_samples,)):
        alone = ranks(world_size).run(run, Subject(), str(tmp_path), *args)[0]
        assert_same(ranks_of(subject, world_size).run(run, subject, str(tmp_path), *args)[0], alone)
