"""Adapters and frozen parameters under a Trainer over Partita: only they move, only they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_subjects import (
    Subject,
    arguments,
    build_plainly,
    close,
    close_weights,
    job,
    logged,
    model_of,
    on_ranks,
    pad,
    read_back,
    texts,
    whole_weights,
)
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def adapted() -> Any:
    model = model_of("llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def frozen() -> Any:
    """All but the second layer."""
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    return model


MODELS = {"adapted": adapted, "frozen": frozen}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def run_of(subject: Subject, folder: str, kind: str, resume_from: str | None = None) -> dict[str, Any]:
    with job():
        given = arguments(
            folder,
            max_steps=6,
            learning_rate=0.05,
            optim="adamw_torch",
            max_grad_norm=0.1,
            save_strategy="steps",
            save_steps=2,
            **BEST,
        )
        model = MODELS[kind]()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        moving = {name for name, p in model.named_parameters() if p.requires_grad}
        data = {"train_dataset": texts(24), "eval_dataset": texts(6, seed=9), "data_collator": pad}
        trainer = subject.trainer(transformers.Trainer, model, given, **data)
        trainer.train(resume_from_checkpoint=resume_from)
        weights = whole_weights(trainer)
        for name, value in before.items():
            assert torch.equal(value, weights[name]) == (name not in moving), name
        losses = logged(trainer, "eval_loss")
        assert trainer.evaluate()["eval_loss"] == min(losses)
        trainer.save_model(folder)
        if dist.get_world_size() > 1:
            dist.barrier()
        _read_back(kind, folder, weights)
        return {
            "loss": [*logged(trainer, "loss"), *losses],
            "norm": logged(trainer, "grad_norm"),
            "rate": logged(trainer, "learning_rate"),
            "weights": weights,
            "best": trainer.state.best_global_step,
        }


def _read_back(kind: str, folder: str, weights: dict[str, Any]) -> None:
    if kind == "adapted":
        saved = load_file(Path(folder) / "adapter_model.safetensors")
        assert saved
        assert all("lora_" in name for name in saved)
        assert not (Path(folder) / "model.safetensors").exists()
        build_plainly()
        loaded = peft.PeftModel.from_pretrained(model_of("llama"), folder)
    else:
        loaded = read_back(folder)
    close_weights(loaded.state_dict(), weights, 0.0)


@on_ranks(1, 2, alias=True)
@pytest.mark.parametrize("kind", MODELS)
def test_only_what_is_trained_moves_and_is_saved(ranks, ranks_of, tmp_path, subject, world_size, kind):
    """O6: Trainer's own numbers; the best model at the end; a resumed run is the unbroken one."""
    pool = ranks_of(subject, world_size)
    alone = ranks(world_size).run(run_of, Subject(), str(tmp_path / "alone"), kind)
    over = pool.run(run_of, subject, str(tmp_path / "over"), kind)
    for actual, expected in zip(over, alone, strict=True):
        for name in ("loss", "norm"):
            close(actual[name], expected[name], 1e-3)
        assert actual["rate"] == expected["rate"]
        assert actual["best"] == expected["best"]
    names = {path.name for path in (tmp_path / "over" / "checkpoint-4").iterdir()}
    assert ("adapter_model.safetensors" in names) == (kind == "adapted")
    again = pool.run(run_of, subject, str(tmp_path / "again"), kind, f"{tmp_path}/over/checkpoint-4")
    for actual, expected in zip(again, over, strict=True):
        assert {k: v for k, v in actual.items() if k != "weights"} == {
            k: v for k, v in expected.items() if k != "weights"
        }
        close_weights(actual["weights"], expected["weights"], 0.0)


def _two_adapters() -> Any:
    """The second one is frozen; both change the embedding, which PEFT then saves with them."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_of("llama"), config)
    model.add_adapter("reference", config)
    return model


def _saves_each_adapter(subject: Subject, folder: str) -> None:
    with job():
        given = arguments(folder, max_steps=1, learning_rate=0.05)
        data = {"train_dataset": texts(8), "data_collator": pad}
        trainer = subject.trainer(transformers.Trainer, _two_adapters(), given, **data)
        trainer.train()
        trainer.save_model(folder)


@pytest.mark.slow
def test_a_frozen_adapter_is_saved_as_itself(ranks, tmp_path):
    """All that PEFT writes of each adapter, and nothing of another one, as without Partita."""
    files = ("adapter_model.safetensors", "reference/adapter_model.safetensors")
    saved = {}
    for name, subject in (("alone", Subject()), ("over", Subject("partita", 3))):
        ranks(1).run(_saves_each_adapter, subject, str(tmp_path / name))
        saved[name] = [load_file(tmp_path / name / file) for file in files]
    for actual, expected in zip(saved["over"], saved["alone"], strict=True):
        close_weights(actual, expected, 1e-3)
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in saved["alone"][0])
