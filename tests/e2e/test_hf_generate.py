"""Generation while a Trainer trains: in the evaluation of Seq2SeqTrainer, and by a callback between steps."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_subjects import (
    VOCABULARY,
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
)
from hf_subjects import whole_weights as weights_of

transformers = pytest.importorskip("transformers")


def pairs(count: int) -> list[dict[str, list[int]]]:
    source = random.Random(4)
    return [
        {
            name: [source.randrange(3, VOCABULARY) for _ in range(source.randrange(2, 9))]
            for name in ("input_ids", "labels")
        }
        for _ in range(count)
    ]


def evaluated(subject: Subject, folder: str) -> dict[str, Any]:
    """An encoder and decoder whose evaluation generates, of 7 samples: the last batch is padded on one rank."""
    seen: list[Any] = []
    with job():
        given = arguments(
            folder,
            "Seq2SeqTrainingArguments",
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            predict_with_generate=True,
            generation_max_length=9,
            learning_rate=1.0,
        )
        trainer = subject.trainer(
            transformers.Seq2SeqTrainer,
            model_of("t5"),
            given,
            train_dataset=pairs(16),
            eval_dataset=pairs(7),
            data_collator=pad,
            compute_metrics=lambda result: (
                seen.append(result.predictions.tolist()) or {"samples": len(result.predictions)}
            ),
        )
        trainer.train()
        seen.append(trainer.predict(pairs(3), num_beams=2).predictions.tolist())
        return {
            "tokens": seen,
            "loss": logged(trainer, "loss"),
            "eval": logged(trainer, "eval_loss"),
            "samples": logged(trainer, "eval_samples"),
            "weights": weights_of(trainer),
        }


def between_steps(subject: Subject, folder: str) -> dict[str, Any]:
    """A callback continues another prompt to another length on each rank, after every second step."""
    said: list[list[int]] = []

    class Generates(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
            if state.global_step % 2 == 0:
                rank = dist.get_rank()
                prompt = torch.arange(5, 8 + rank)[None]
                length = 4 + 5 * rank
                was_training = model.training
                model.eval()
                said.extend(
                    model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False).tolist()
                )
                model.train(was_training)

    with job():
        given = arguments(folder, max_steps=4, learning_rate=1.0)
        trainer = subject.trainer(
            transformers.Trainer,
            model_of("gpt2"),
            given,
            train_dataset=texts(16),
            data_collator=pad,
            callbacks=[Generates()],
        )
        trainer.train()
        return {"tokens": said, "loss": logged(trainer, "loss"), "weights": weights_of(trainer)}


@on_ranks(1, 2, alias=True)
def test_generation_says_what_it_says_under_trainer_alone(ranks, ranks_of, tmp_path, subject, world_size):
    """S2, S5: the ranks' texts have different lengths; the training goes on as if nothing had been generated."""
    for run in (evaluated, between_steps):
        alone = ranks(world_size).run(run, Subject(), str(tmp_path))
        over = ranks_of(subject, world_size).run(run, subject, str(tmp_path))
        for actual, expected in zip(over, alone, strict=True):
            assert expected["tokens"][0] != expected["tokens"][1]  # the steps change what is said
            assert actual["tokens"] == expected["tokens"]
            close(actual["loss"], expected["loss"])
            close(actual.get("eval", []), expected.get("eval", []))
            assert actual.get("samples") == expected.get("samples")
            close_weights(actual["weights"], expected["weights"], 2e-5)
