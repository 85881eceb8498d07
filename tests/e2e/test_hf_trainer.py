"""Trainer over Partita: logs, checkpoints and weights of plain Trainer under DDP, in every stage, on real ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_runs import furthest, gpt2, launched, run, stage, trainer_of
from partita.optim import WarmupDecayLR
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WHOLE_RUN: dict[str, Any] = {
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.5,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # so the best is the first, and not what is there anyway
}


def as_launched(function: Any, *args: Any) -> Any:
    with launched():
        return function(*args)


def ours() -> Any:
    from partita.integrations.huggingface import PartitaTrainer

    return PartitaTrainer


def folders(path: str) -> list[str]:
    return sorted(p.name for p in Path(path).glob("checkpoint-*"))


# -- as plain Trainer


def _trains_as_trainer(folder: str, stages: tuple[int, ...]) -> None:
    """Unequal numbers of tokens and samples, clipping, accumulation that an epoch does not divide, the best model."""
    expected = run(transformers.Trainer, f"{folder}/plain", **WHOLE_RUN, num_train_epochs=2, max_steps=-1)
    for number in stages:
        path = f"{folder}/{number}"
        seen = run(ours(), path, **WHOLE_RUN, num_train_epochs=2, max_steps=-1, given=stage(number))
        assert len(seen.steps) >= 10
        assert furthest(seen.steps, expected.steps) < 3e-6, number
        assert seen.evaluations == pytest.approx(expected.evaluations, abs=3e-6)
        seen.trainer.save_model(f"{path}/best")
        dist.barrier()
        assert folders(path) == folders(f"{folder}/plain")
        saved, plain = (load_file(Path(p) / "model.safetensors") for p in (f"{path}/best", _best_of(expected)))
        assert saved.keys() == plain.keys() and "lm_head.weight" not in saved, "tied weights are saved once"
        for name, value in plain.items():
            torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-4)
        read = transformers.AutoModelForCausalLM.from_pretrained(f"{path}/best")
        assert torch.equal(read.lm_head.weight, saved["transformer.wte.weight"])


def _best_of(seen: Any) -> str:
    return str(seen.trainer.state.best_model_checkpoint)


def test_it_logs_and_saves_what_trainer_does(ranks, tmp_path):
    """G6: the mean over all tokens of all ranks."""
    ranks(2).run(as_launched, _trains_as_trainer, str(tmp_path), (0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_it_logs_and_saves_what_trainer_does_in_every_stage(ranks, tmp_path, world):
    ranks(world).run(as_launched, _trains_as_trainer, str(tmp_path), (0, 1, 2, 3))


# -- resumed


def _resumes(folder: str, number: int, transport: str, precision: dict[str, bool]) -> None:
    """With dropout and shuffled data, in the middle of an epoch; by path and by True; with the last one half saved."""
    options = {**WHOLE_RUN, **precision, "max_steps": 8, "save_total_limit": None, "load_best_model_at_end": False}
    given = stage(number, comm={"transport": transport})
    whole = run(ours(), f"{folder}/whole", **options, given=given)
    weights = whole.trainer.engine.module_state_dict()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(f"{folder}/whole/checkpoint-4", f"{folder}/parts/checkpoint-4")
        shutil.copytree(f"{folder}/whole/checkpoint-6", f"{folder}/parts/checkpoint-6")
        (Path(folder) / "parts" / "checkpoint-6" / "trainer_state.json").unlink()
    dist.barrier()
    for resume in (True, f"{folder}/parts/checkpoint-4"):
        resumed = run(ours(), f"{folder}/parts", resume=resume, **options, given=given)
        assert resumed.steps == whole.steps
        assert resumed.evaluations == whole.evaluations
        for name, value in resumed.trainer.engine.module_state_dict().items():
            assert torch.equal(value, weights[name]), name
        dist.barrier()


def test_a_resumed_run_is_the_unbroken_one(ranks, tmp_path):
    ranks(2).run(as_launched, _resumes, str(tmp_path), 3, "auto", {})


@pytest.mark.slow
@pytest.mark.parametrize("over", ["auto", "torch"])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one_in_every_stage(ranks, tmp_path, number, over):
    ranks(2).run(as_launched, _resumes, str(tmp_path), number, over, {"bf16": number % 2 == 1})


# -- precision


def _mixes_precisions(folder: str) -> None:
    """The engine's bf16, with fp32 sums over micro-batches: all stages agree, and Trainer's autocast nearly."""
    plain = run(transformers.Trainer, folder, bf16=True, gradient_accumulation_steps=4)
    first, *others = (
        run(ours(), folder, bf16=True, gradient_accumulation_steps=4, given=stage(number)) for number in (2, 3)
    )
    assert first.trainer.engine.config.bf16.enabled
    assert first.trainer.engine.config.data_types.grad_accum_dtype == "fp32"
    assert furthest(first.steps, plain.steps) < 5e-2
    for other in others:
        assert other.steps == first.steps


@pytest.mark.slow
def test_bf16_trains_with_fp32_masters_and_sums(ranks, tmp_path):
    ranks(2).run(as_launched, _mixes_precisions, str(tmp_path))


def _skips(folder: str) -> list[tuple[float, float]]:
    """(step, learning rate) as logged; the third of the steps has a gradient that is not finite."""
    model = gpt2(resid_pdrop=0.0)
    steps = []

    def spoil(loss: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return loss * float("inf") if len(steps) == 3 else loss

    class Spoiled(ours()):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return spoil(super().compute_loss(*args, **kwargs))

    seen = run(Spoiled, folder, model, given=stage(2), logging_nan_inf_filter=False)
    assert seen.trainer.engine.skipped_steps == 1
    return [step[2] for step in seen.steps]


def test_a_skipped_step_does_not_move_the_learning_rate(ranks, tmp_path):
    """O5, N1"""
    rates = ranks(2).run(as_launched, _skips, str(tmp_path))[0]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01, 0.0075, 0.005])


# -- the config


def _takes_a_config_of_the_field(folder: str) -> None:
    """With "auto" everywhere, and with an optimizer and a schedule; Trainer steps them."""
    auto = ("lr", "betas", "eps", "weight_decay")
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(auto, "auto")},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {**dict.fromkeys(("warmup_num_steps", "warmup_max_lr", "total_num_steps"), "auto")}
            | {"warmup_type": "linear"},
        },
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    path = Path(folder) / f"config-{dist.get_rank()}.json"
    path.write_text(json.dumps(config))
    expected = run(ours(), folder, weight_decay=0.1, given=stage(2))
    seen = run(ours(), folder, weight_decay=0.1, given={"partita_config": str(path)})
    assert type(seen.trainer.optimizer.engine.optimizer.inner).__name__ == "FusedAdam"
    assert type(seen.trainer.lr_scheduler).__name__ == "WarmupDecayLR"
    assert furthest(seen.steps[:1], expected.steps[:1]) < 3e-6
    assert [step[2] for step in seen.steps] == pytest.approx(_decayed())
    groups = seen.trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def _decayed() -> list[float]:
    """The rates of the six steps by the schedule itself."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = WarmupDecayLR(optimizer, 6, warmup_max_lr=1e-2, warmup_num_steps=2, warmup_type="linear")
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.slow
def test_a_config_with_auto_is_filled_from_the_arguments(ranks, tmp_path):
    ranks(2).run(as_launched, _takes_a_config_of_the_field, str(tmp_path))


# -- refused

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"max_grad_norm": 0.5}, {"gradient_clipping": 2.0}, r"gradient_clipping = 2\.0.*max_grad_norm.* = 0\.5"),
    (
        {"learning_rate": 0.1},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}},
        r"params\.lr = 1\.0.*learning_rate",
    ),
    ({"torch_compile": True}, {}, r"torch_compile.*model\.compile\(\)"),
    ({"auto_find_batch_size": True}, {}, "auto_find_batch_size.*per_device_train_batch_size"),
    ({"bf16": True}, {"fp16": {"enabled": True}}, r"fp16\.enabled.*'bf16'"),
    ({}, {"checkpoint": {"dir": "x"}}, r"checkpoint\.dir"),
    ({}, {"train_batch_size": 5}, r"train_batch_size = 5.*per_device_train_batch_size"),
    ({}, {"optimizer": {"type": "OneBitAdam"}}, "there are no 1-bit optimizers: use AdamW"),
    ({}, {"scheduler": {"params": {}}}, r"scheduler\.type: missing"),
    ({"fsdp": True}, {}, r"TrainingArguments\(fsdp=\.\.\.\)"),
]


def _errors(folder: str) -> list[str]:
    from partita.integrations.huggingface.resume import schedule_state_in

    """Of each case, and of a resume from a folder of another trainer's: it would go on without its optimizer."""
    foreign = Path(folder) / "foreign" / "checkpoint-3"
    foreign.mkdir(parents=True, exist_ok=True)
    (foreign / "optimizer.pt").touch()
    said = []
    for arguments, config, _ in REFUSED:
        with pytest.raises(ValueError) as raised:
            trainer_of(ours(), folder, given={"partita_config": config}, **arguments).train()
        said.append(str(raised.value))
    schedule = Path(folder) / "damaged" / "scheduler.pt"
    for bytes_of_it in (None, b"no schedule"):
        schedule.parent.mkdir(exist_ok=True)
        if bytes_of_it is not None:
            schedule.write_bytes(bytes_of_it)
        with pytest.raises(ValueError, match=r"scheduler\.pt', the state of the .*take an older checkpoint"):
            schedule_state_in(str(schedule.parent))
    model = gpt2()
    config = {"optimizer": {"type": "AdamW"}}
    given = {"partita_config": config, "optimizers": (torch.optim.SGD(model.parameters()), None)}
    with pytest.raises(ValueError, match="optimizer is in the config, and the program gives the trainer its own, SGD"):
        trainer_of(ours(), folder, model, given).train()
    with pytest.raises(TypeError, match=r"PartitaMixin comes before the trainer: class Wrong\(PartitaMixin"):
        type("Wrong", (transformers.Trainer, ours().__mro__[1]), {})
    for output, resume in ((f"{folder}/foreign", True), (folder, str(foreign)), (folder, f"{folder}/nowhere")):
        with pytest.raises(ValueError) as raised:
            trainer_of(ours(), output, given=stage(1)).train(resume_from_checkpoint=resume)
        said.append(str(raised.value))
    return said


def test_contradictions_and_what_cannot_be_are_refused_by_name(ranks, tmp_path):
    said = ranks(2).run(as_launched, _errors, str(tmp_path))[0]
    *messages, incomplete, foreign, missing = said
    for message, (_, _, pattern) in zip(messages, REFUSED, strict=True):
        assert re.search(pattern, message), message
    assert re.search("no complete checkpoint.*'checkpoint-3' was saved by another Trainer.*from_pretrained", incomplete)
    assert re.search("there is no folder '.*nowhere'", missing)
    assert re.search("checkpoint-3' was saved by another Trainer.*from_pretrained", foreign)
