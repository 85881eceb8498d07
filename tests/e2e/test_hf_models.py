"""Trainer over Partita with models of every kind: adapters, built partitioned, evaluated first, generating, watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_runs import Texts, furthest, gpt2, launched, run, stage, trainer_of
from partita.zero import GatheredParameters
from safetensors.torch import load_file
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TRANSPORTS = ("auto", "torch")


def as_launched(function: Any, *args: Any) -> Any:
    with launched():
        return function(*args)


def ours() -> Any:
    from partita.integrations.huggingface import PartitaTrainer

    return PartitaTrainer


# -- adapters


def with_adapter(**sizes: Any) -> Any:
    import peft

    model = gpt2(**sizes)
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora)


def _adapts(folder: str, number: int, only_model: bool) -> None:
    """Adapters alone are saved; the best ones are loaded at the end; a resumed run is the unbroken one."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # so the best is the first, and not what is there anyway
        "save_only_model": only_model,
    }
    expected = run(transformers.Trainer, f"{folder}/plain", with_adapter(), **options)
    seen = run(ours(), f"{folder}/ours", with_adapter(), **options, given=stage(number))
    assert furthest(seen.steps, expected.steps) < 3e-6
    assert seen.evaluations == pytest.approx(expected.evaluations, abs=3e-6)
    for trainer in (expected.trainer, seen.trainer):
        trainer.save_model(f"{folder}/{type(trainer).__name__}")
    dist.barrier()
    plain, saved = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("Trainer", "PartitaTrainer"))
    assert saved.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-4)
    assert not Path(folder, "ours", "checkpoint-3", "model.safetensors").exists()
    if not only_model:
        resumed = run(
            ours(), f"{folder}/ours", with_adapter(), f"{folder}/ours/checkpoint-3", **options, given=stage(number)
        )
        assert resumed.steps == seen.steps


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("only_model", [False, True])
def test_adapters_train_alone_and_are_saved_alone(ranks, tmp_path, number, only_model):
    """O6"""
    pytest.importorskip("peft")
    ranks(2).run(as_launched, _adapts, str(tmp_path), number, only_model)


def _writes_the_base_once(folder: str) -> list[int]:
    """The names that the base's file has, in two checkpoints, and in that of a run which goes on from the first."""
    options = {"save_strategy": "steps", "save_steps": 2, "given": stage(3)}
    run(ours(), f"{folder}/whole", with_adapter(vocab_size=30_000), max_steps=4, **options)
    first = f"{folder}/whole/checkpoint-2"
    run(ours(), f"{folder}/resumed", with_adapter(vocab_size=30_000), first, max_steps=4, **options)
    paths = [first, f"{folder}/whole/checkpoint-4", f"{folder}/resumed/checkpoint-4"]
    return [Path(path, "partita", "model-00001-of-00002.safetensors").stat().st_ino for path in paths]


@pytest.mark.slow
def test_checkpoints_of_adapters_share_their_base(ranks, tmp_path):
    assert len(set(ranks(2).run(as_launched, _writes_the_base_once, str(tmp_path))[0])) == 1


# -- built partitioned; trained twice; evaluated first


def _builds_partitioned(folder: str, over: str, evaluates_first: bool) -> None:
    from partita import zero

    given = stage(3, comm={"transport": over})
    with zero.Init(config=given["partita_config"]):
        model = gpt2()
    whole, partitioned = (trainer_of(ours(), folder, one, given=given) for one in (gpt2(), model))
    found = []
    for trainer in (whole, partitioned):
        torch.manual_seed(5)
        first = trainer.evaluate()["eval_loss"] if evaluates_first else 0.0
        torch.manual_seed(6)
        trainer.train()
        found.append((first, trainer.state.log_history[-2]["loss"], trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("evaluates_first", [False, True])
def test_a_model_of_zero_init_trains_as_a_whole_one(ranks, tmp_path, over, evaluates_first):
    ranks(2).run(as_launched, _builds_partitioned, str(tmp_path), over, evaluates_first)


def _trains_twice(folder: str, number: int) -> None:
    """As Trainer: the second train() begins a new schedule, and goes on with weights and moments."""
    found = []
    for cls, given in ((transformers.Trainer, None), (ours(), stage(number))):
        trainer = trainer_of(cls, folder, given=given, max_steps=4)
        trainer.train()
        trainer.train()
        found.append([tuple(log[name] for name in ("loss", "grad_norm")) for log in trainer.state.log_history[:-1]])
        found[-1].append((trainer.evaluate()["eval_loss"],))
    assert furthest(found[1], found[0]) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_a_trainer_may_train_twice(ranks, tmp_path, number):
    ranks(2).run(as_launched, _trains_twice, str(tmp_path), number)


def _begins_anew(folder: str) -> None:
    """With `model_init` each train() has a new model, and the engine of the one before ends."""
    trainer = trainer_of(ours(), folder, given={**stage(1), "model_init": lambda: gpt2()}, has_model=False)
    found = []
    for _ in range(2):
        trainer.train()
        found.append((trainer.state.log_history[-2]["loss"], trainer.evaluate()["eval_loss"]))
        engine = trainer.engine
    assert found[0] == found[1]
    trainer.train()
    with pytest.raises(RuntimeError, match="destroy"):
        engine.save_model("nowhere")


@pytest.mark.slow
def test_a_model_made_by_model_init_begins_anew(ranks, tmp_path):
    ranks(2).run(as_launched, _begins_anew, str(tmp_path))


# -- generation


class Reversals(Texts):
    """To write an input backwards; answers have different lengths."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(index))
        labels = torch.cat([ids.flip(0)[: 4 + index % 4], torch.full((4 - index % 4,), -100)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def bart() -> Any:
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = transformers.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=32, **sides)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def _metrics(prediction: Any) -> dict[str, float]:
    written = prediction.predictions
    return {"sum": float(written[written > 0].sum()), "count": float(len(written))}


def _generates(folder: str, number: int, over: str) -> None:
    from partita.integrations.huggingface import PartitaMixin

    class Ours(PartitaMixin, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    found = []
    for cls, given in (
        (transformers.Seq2SeqTrainer, {}),
        (Ours, stage(number, comm={"transport": over})),
    ):
        more = {"train_dataset": Reversals(), "eval_dataset": Reversals(), "compute_metrics": _metrics}
        seen = run(
            cls,
            folder,
            bart(),
            given={**given, **more, "arguments_class": transformers.Seq2SeqTrainingArguments},
            predict_with_generate=True,
            generation_max_length=12,
            eval_strategy="steps",
            eval_steps=3,
        )
        logs = [log for log in seen.trainer.state.log_history if "eval_sum" in log]
        found.append([(log["eval_loss"], log["eval_sum"], log["eval_count"]) for log in logs])
    assert len(found[0]) == 2 and found[0][0] != found[0][1]
    assert furthest(found[1], found[0]) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("over", TRANSPORTS)
@pytest.mark.parametrize("number", [1, 3])
def test_evaluation_generates(ranks, tmp_path, number, over):
    """S2, S5"""
    ranks(2).run(as_launched, _generates, str(tmp_path), number, over)


# -- callbacks


class _Watches(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.before = torch.zeros(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self._weights(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moved = not torch.equal(self.before, self._weights(kwargs["model"]))
        self.events.append(f"optimizer_step {state.global_step} {moved}")

    def _weights(self, model: Any) -> Tensor:
        """Of the first layer."""
        with GatheredParameters(first := model.transformer.h[0].mlp.c_fc.weight):
            return first.detach().clone()  # type: ignore[no-any-return]


def _note(event: str) -> Any:
    def noted(self: _Watches, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"{event} {state.global_step} {type(kwargs['model']).__name__}")

    return noted


for _event in ("train_begin", "step_begin", "substep_end", "step_end", "evaluate", "save", "log", "train_end"):
    setattr(_Watches, f"on_{_event}", _note(_event))


def _calls_back(folder: str) -> None:
    """The same calls as Trainer's, and the same early end."""
    events = []
    for cls, given in ((transformers.Trainer, {}), (ours(), stage(3))):
        watches = _Watches()
        stops = transformers.EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
        run(
            cls,
            f"{folder}/{cls.__name__}",
            given={**given, "callbacks": [watches, stops]},
            gradient_accumulation_steps=2,
            max_steps=20,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
        )
        events.append(watches.events)
    assert events[1] == events[0]
    assert "optimizer_step 0 False" in events[0] and "optimizer_step 1 True" in events[0], "the first has no rate"
    assert events[0][-1] == "train_end 4 GPT2LMHeadModel"


@pytest.mark.slow
def test_callbacks_see_what_trainer_shows_and_stop_it(ranks, tmp_path):
    ranks(2).run(as_launched, _calls_back, str(tmp_path))
