"""What a Trainer over Partita writes and reads: models, rotated checkpoints, resumed runs, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_subjects import (
    Subject,
    arguments,
    close,
    job,
    logged,
    model_of,
    on_ranks,
    pad,
    read_back,
    texts,
    tokenizer,
    whole_weights,
)
from safetensors import safe_open
from torch import Tensor

transformers = pytest.importorskip("transformers")

KEPT = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


def trainer_of(subject: Subject, folder: str | Path, kind: str = "gpt2", callbacks: Any = None, **changes: Any) -> Any:
    """Nine steps with moments, dropout, a schedule and shuffled data."""
    given = arguments(
        folder, **{"max_steps": 9, "optim": "adamw_torch", "learning_rate": 0.01, "warmup_steps": 3} | changes
    )
    model = model_of(kind, resid_pdrop=0.1)
    data = {"train_dataset": texts(24), "eval_dataset": texts(6, seed=9), "data_collator": pad}
    return subject.trainer(
        transformers.Trainer, model, given, processing_class=tokenizer(), callbacks=callbacks, **data
    )


def checkpoints(folder: str | Path) -> list[str]:
    """Names of the folders that Trainer takes for checkpoints."""
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# -- files


def _saves(subject: Subject, folder: str) -> None:
    with job():
        trainer = trainer_of(subject, folder, max_steps=2)
        trainer.train()
        weights = whole_weights(trainer)
        trainer.save_model(folder)
        _barrier()
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            names = set(file.keys())
            assert file.metadata() == {"format": "pt"}
        assert "transformer.wte.weight" in names
        assert "lm_head.weight" not in names  # tied: once
        assert names | {"lm_head.weight"} == weights.keys()
        loaded = read_back(folder)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        same_bits(loaded.state_dict(), weights)
        assert loaded.dtype is torch.float32
        assert not torch.equal(weights["lm_head.weight"], model_of("gpt2").lm_head.weight)
        assert transformers.AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"
        for name in ("config.json", "generation_config.json", "training_args.bin"):
            assert (Path(folder) / name).is_file()
        head = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        assert head.lm_head.weight is head.transformer.wte.weight


def _barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


@on_ranks(1, 2, alias=True)
def test_a_saved_model_has_tied_weights_once_and_is_read_by_from_pretrained(ranks_of, tmp_path, subject, world_size):
    """C5, and no hub."""
    ranks_of(subject, world_size).run(_saves, subject, str(tmp_path))


# -- resumed runs


def run_of(subject: Subject, folder: str, changes: dict[str, Any], resume_from: str | None = None) -> dict[str, Any]:
    with job():
        trainer = trainer_of(subject, folder, **KEPT | changes)
        trainer.train(resume_from_checkpoint=resume_from)
        return {
            "loss": logged(trainer, "step", "loss"),
            "rate": logged(trainer, "step", "learning_rate"),
            "norm": logged(trainer, "step", "grad_norm"),
            "keys": [sorted(row) for row in trainer.state.log_history],
            "weights": whole_weights(trainer),
        }


@on_ranks(1, 2, alias=True, quick=True)
def test_a_resumed_run_is_the_unbroken_one(ranks, ranks_of, tmp_path, subject, world_size):
    """O5, C9: bits of the weights, and so of the moments, data and dropout; the learning rates; what is logged."""
    changes = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    pool = ranks_of(subject, world_size)
    alone = ranks(world_size).run(run_of, Subject(), str(tmp_path / "alone"), changes)
    whole = pool.run(run_of, subject, str(tmp_path), changes)
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "alone") == ["checkpoint-8", "checkpoint-9"]
    for actual, expected in zip(whole, alone, strict=True):
        assert actual["rate"] == expected["rate"]
        assert actual["keys"] == expected["keys"]
        close([loss for _, loss in actual["loss"]], [loss for _, loss in expected["loss"]], 1e-3)
    changes["save_total_limit"] = None
    pool.run(run_of, subject, str(tmp_path / "kept"), changes)
    for step in (4, 6):  # in the middle of an epoch, and at its end
        again = pool.run(run_of, subject, str(tmp_path / f"from-{step}"), changes, f"{tmp_path}/kept/checkpoint-{step}")
        for actual, expected in zip(again, whole, strict=True):
            for name in ("loss", "rate", "norm", "keys"):
                assert actual[name][:-1] == expected[name][:-1], name
            same_bits(actual["weights"], expected["weights"])


# -- the best model


def best_of(subject: Subject, folder: str, how: dict[str, Any]) -> dict[str, Any]:
    """A learning rate so large that the loss soon rises: stops early, and goes back to the best model."""
    patient = [transformers.EarlyStoppingCallback(early_stopping_patience=2)]
    with job():
        changes = {
            "max_steps": 30,
            "learning_rate": 0.3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
        }
        trainer = trainer_of(subject, folder, callbacks=patient, **KEPT | BEST | changes | how)
        trainer.train()
        state = trainer.state
        best = min(logged(trainer, "eval_loss"))
        assert state.best_metric == best
        assert trainer.evaluate()["eval_loss"] == best
        weights = whole_weights(trainer)
        trainer.save_model(folder)
        _barrier()
        same_bits(read_back(folder).state_dict(), weights)
        assert Path(str(state.best_model_checkpoint)).is_dir()
        return {"steps": state.global_step, "best": state.best_global_step, "losses": logged(trainer, "eval_loss")}


@on_ranks(1, 2, alias=True)
def test_early_stopping_ends_with_the_best_model(ranks, ranks_of, tmp_path, subject, world_size):
    for how in ({}, {"save_total_limit": 1}):
        alone = ranks(world_size).run(best_of, Subject(), str(tmp_path / "alone"), how)
        over = ranks_of(subject, world_size).run(best_of, subject, str(tmp_path / "over"), how)
        for actual, expected in zip(over, alone, strict=True):
            assert expected["best"] < expected["steps"] < 30
            assert (actual["steps"], actual["best"]) == (expected["steps"], expected["best"])
            close(actual["losses"], expected["losses"], 1e-3)
        assert checkpoints(tmp_path / "over") == checkpoints(tmp_path / "alone")
