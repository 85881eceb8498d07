"""TRL's SFT and DPO trainers over Partita, the reference model beside the trained one: TRL's own numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
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
    model_of,
    on_ranks,
    tokenizer,
    whole_weights,
)

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

Numbers = dict[str, Any]


def words(source: random.Random) -> str:
    return "".join(chr(48 + source.randrange(48)) for _ in range(source.randrange(3, 12)))


def datasets_of(folder: str, *columns: str) -> dict[str, Any]:
    """For training and evaluation, from files: ranks find each other's caches beside those."""
    import datasets

    source = random.Random(2)
    for name, count in (("train", 14), ("eval", 5)):
        rows = [{column: words(source) for column in columns} for _ in range(count)]
        if dist.get_rank() == 0:
            datasets.Dataset.from_list(rows).save_to_disk(f"{folder}/{name}")
    dist.barrier()
    return {f"{name}_dataset": datasets.load_from_disk(f"{folder}/{name}") for name in ("train", "eval")}


def lora() -> Any:
    import peft

    torch.manual_seed(1)
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def settings(folder: str, kind: str, **changes: Any) -> Any:
    """Seven steps, of which the last has one micro-batch on one rank; checkpointing of activations is TRL's default."""
    given = {
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.8,
        "learning_rate": 0.3,
        "bf16": False,
    }
    given |= {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
    }
    return arguments(folder, kind=getattr(trl, kind), **given | changes)


def numbers_of(trainer: Any, folder: str, **names: str) -> Numbers:
    """Trains; everything that was logged but times, and the weights."""
    trainer.train()
    rows = [
        {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
        for row in trainer.state.log_history
    ]
    weights = whole_weights(trainer)
    trainer.save_model(folder)
    return {"rows": rows[:-1], "weights": weights}


def sft(subject: Subject, folder: str, changes: dict[str, Any]) -> Numbers:
    with job():
        given = settings(folder, "SFTConfig", max_length=16, **changes)
        data = datasets_of(folder, "text")
        trainer = subject.trainer(trl.SFTTrainer, model_of("llama"), given, processing_class=tokenizer(), **data)
        return numbers_of(trainer, folder)


def sft_adapter(subject: Subject, folder: str, changes: dict[str, Any]) -> Numbers:
    with job():
        given = settings(folder, "SFTConfig", max_length=16, **changes)
        data = datasets_of(folder, "prompt", "completion")
        trainer = subject.trainer(
            trl.SFTTrainer, model_of("llama"), given, processing_class=tokenizer(), peft_config=lora(), **data
        )
        return numbers_of(trainer, folder)


PREFERENCES = ("prompt", "chosen", "rejected")


def dpo(subject: Subject, folder: str, changes: dict[str, Any]) -> Numbers:
    with job():
        given = settings(folder, "DPOConfig", beta=0.5, **changes)
        data = datasets_of(folder, *PREFERENCES)
        reference = model_of("llama", initializer_range=0.05)
        reference_before = {name: value.clone() for name, value in reference.state_dict().items()}
        trainer = subject.trainer(
            trl.DPOTrainer, model_of("llama"), given, ref_model=reference, processing_class=tokenizer(), **data
        )
        numbers = numbers_of(trainer, folder)
        after = trainer.accelerator.get_state_dict(trainer.ref_model)
        if after:
            close_weights(after, reference_before, 0.0)
        return numbers


def dpo_adapter(subject: Subject, folder: str, changes: dict[str, Any]) -> Numbers:
    with job():
        given = settings(folder, "DPOConfig", beta=0.5, **changes)
        data = datasets_of(folder, *PREFERENCES)
        trainer = subject.trainer(
            trl.DPOTrainer, model_of("llama"), given, processing_class=tokenizer(), peft_config=lora(), **data
        )
        return numbers_of(trainer, folder)


def assert_same(actual: Numbers, expected: Numbers, folder: Path) -> None:
    assert [sorted(row) for row in actual["rows"]] == [sorted(row) for row in expected["rows"]]
    assert any("eval_loss" in row for row in expected["rows"])
    for one, other in zip(actual["rows"], expected["rows"], strict=True):
        for name in one:
            close(one[name], other[name], 2e-4, 5e-6)
    close_weights(actual["weights"], expected["weights"], 1e-5)


RUNS: list[tuple[Callable[..., Numbers], dict[str, Any]]] = [
    (sft, {}),
    (sft, {"gradient_checkpointing": False, "packing": True, "loss_type": "nll"}),
    (sft_adapter, {}),
    (dpo, {}),
    (dpo, {"precompute_ref_log_probs": True, "gradient_checkpointing": False}),
    (dpo_adapter, {}),
]


@pytest.mark.parametrize(
    "run,changes", RUNS, ids=lambda value: getattr(value, "__name__", None) or "+".join(value) or "as-is"
)
@on_ranks(1, 2)
def test_numbers_are_those_of_the_trainer_alone(ranks, tmp_path, subject, world_size, run, changes):
    alone = ranks(world_size).run(run, Subject(), str(tmp_path / "alone"), changes)
    over = ranks(world_size).run(run, subject, str(tmp_path / "over"), changes)
    for actual, expected in zip(over, alone, strict=True):
        assert_same(actual, expected, tmp_path / "over")
