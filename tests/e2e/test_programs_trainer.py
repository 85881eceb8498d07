"""Programs for Trainer with a DeepSpeed config, unchanged through `partita run`: as with plain Trainer."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import (
    OPTIMIZER_AND_SCHEDULE,
    Programs,
    logged,
    save_config,
    save_distilbert,
    save_gpt2,
    sentence,
)
from safetensors.torch import load_file
from warm_python import WarmPython

pytest.importorskip("transformers")
pytest.importorskip("datasets")

STEPS = 6
COMMON = [
    *("--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--logging_steps", 1, "--learning_rate", 1e-2),
    *("--seed", 5, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 4, "--warmup_steps", 2),
]
TEXT = ["--model_name_or_path", "gpt2", "--train_file", "train.txt", "--validation_file", "rest.txt"]
LANGUAGE_MODEL = [*TEXT, *COMMON, "--max_steps", STEPS]
FILES = ["--train_file", "train.csv", "--validation_file", "rest.csv", "--test_file", "rest.csv"]
CLASSIFY = ["--model_name_or_path", "distilbert", *FILES, *COMMON, "--num_train_epochs", 1, "--max_grad_norm", 0.5]
BEST = ["--eval_strategy", "steps", "--eval_steps", 4, "--save_steps", 4, "--save_total_limit", 1]


@pytest.fixture(scope="module")
def programs(python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """With models, tokenizers, texts and configs `plain0.json` ... `whole3.json` in its folder."""
    folder = tmp_path_factory.mktemp("programs")
    save_gpt2(folder / "gpt2")
    save_distilbert(folder / "distilbert")
    generator = random.Random(1)
    for name, lines in (("train", 90), ("rest", 21)):
        (folder / f"{name}.txt").write_text("".join(f"{sentence(generator, 24)}\n" for _ in range(lines)))
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["label", "first", "second"])
            table.writerows([i % 2, sentence(generator, 9), sentence(generator, 9)] for i in range(lines // 2))
    for stage in range(4):
        save_config(folder / f"plain{stage}.json", stage, zero_allow_untested_optimizer=True)
        save_config(folder / f"whole{stage}.json", stage, **OPTIMIZER_AND_SCHEDULE)
    return Programs(python, folder)


def out(programs: Programs, name: str, program: str, *arguments: Any, **how: Any) -> Path:
    """The folder that the program wrote to; run once."""
    folder = programs.folder / name
    if not folder.exists():
        programs.run(program, *arguments, "--output_dir", folder, **how)
    return folder


def assert_same_run(
    ours: Path, theirs: Path, within: float = 2e-4, names: tuple[str, ...] = ("loss", "grad_norm")
) -> None:
    """The losses and norms of all steps, the evaluation, and the weights that were saved."""
    mine, other = logged(ours), logged(theirs)
    for name in (*names, "eval_loss"):
        assert mine[name] == pytest.approx(other[name], rel=within), name
    expected = load_file(theirs / "model.safetensors")
    # What transformers has loaded in stage 3 of DeepSpeed's, it saves by the names that BERT had in TensorFlow.
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    weights = {
        next((name.replace(a, b) for a, b in old.items() if name.endswith(a)), name): value
        for name, value in load_file(ours / "model.safetensors").items()
    }
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        torch.testing.assert_close(weights[name], value, rtol=0, atol=10 * within, msg=name)


def plain(programs: Programs, *more: Any, ranks: int = 2) -> Path:
    """The language model by Trainer alone."""
    name = "plain" + "".join(map(str, more)).replace("/", "") + str(ranks)
    keep = ["--save_strategy", "no"]
    return out(programs, name, "language_model.py", *LANGUAGE_MODEL, *keep, *more, ranks=ranks, partita=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_language_model_trains_as_by_trainer_alone(programs, stage):
    """Trainer's own optimizer and schedule; `from_pretrained` reads what `save_model` wrote."""
    from transformers import AutoModelForCausalLM

    given = ["--deepspeed", f"plain{stage}.json", "--save_strategy", "no"]
    ours = out(programs, f"plain-{stage}", "language_model.py", *LANGUAGE_MODEL, *given)
    assert_same_run(ours, plain(programs))
    assert len(logged(ours)["loss"]) == STEPS
    read = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    saved = load_file(ours / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in saved.items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_with_the_configs_optimizer_and_schedule_and_several_micro_batches(programs, stage, ranks):
    """`AdamW` and `WarmupDecayLR` with every parameter "auto"; the learning rate is that of a table."""
    more = ["--gradient_accumulation_steps", 3, "--max_grad_norm", 0.5]
    given = ["--deepspeed", f"whole{stage}.json", "--save_strategy", "no"]
    ours = out(programs, f"whole-{stage}-{ranks}", "language_model.py", *LANGUAGE_MODEL, *given, *more, ranks=ranks)
    assert len(logged(ours)["loss"]) == STEPS
    first = out(programs, f"whole-0-{ranks}", "language_model.py", *LANGUAGE_MODEL, *given, *more, ranks=ranks)
    assert_same_run(ours, first)
    # log(1) / log(2) of it, then all of it, then down to nothing: the rate after each step
    assert logged(ours)["learning_rate"] == pytest.approx([0, 1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    reference = plain(programs, *more, ranks=ranks)
    assert logged(ours)["loss"][0] == pytest.approx(logged(reference)["loss"][0], rel=1e-5)
    assert logged(ours)["grad_norm"][0] == pytest.approx(logged(reference)["grad_norm"][0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_in_bf16(programs, stage):
    """Masters are fp32, as autocast has them; forwards differ by the roundings of weights."""
    given = ["--deepspeed", f"plain{stage}.json", "--save_strategy", "no", "--bf16"]
    ours = logged(out(programs, f"bf16-{stage}", "language_model.py", *LANGUAGE_MODEL, *given))
    theirs = logged(plain(programs, "--bf16"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "stage"), [("plain", 1), ("plain", 3), ("whole", 2)])
def test_resumed_in_the_middle_it_is_the_unbroken_run(programs, config, stage):
    given = ["--deepspeed", f"{config}{stage}.json", "--save_steps", STEPS // 2, "--gradient_accumulation_steps", 2]
    name = f"unbroken-{config}-{stage}"
    whole = out(programs, name, "language_model.py", *LANGUAGE_MODEL, *given)
    middle = whole / f"checkpoint-{STEPS // 2}"
    resumed = out(
        programs, f"{name}-resumed", "language_model.py", *LANGUAGE_MODEL, *given, "--resume_from_checkpoint", middle
    )
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert logged(resumed)[key] == logged(whole)[key], key
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(resumed / "model.safetensors").items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_classifier_over_an_uneven_epoch_with_its_best_weights_and_predictions(programs, stage):
    """An epoch whose last batches differ between ranks, the best checkpoint loaded at the end, padding to 8."""
    given = [*CLASSIFY, *BEST, "--load_best_model_at_end", "--metric_for_best_model", "loss"]
    theirs = out(programs, "classify", "sentences.py", *given, partita=False)
    ours = out(programs, f"classify-{stage}", "sentences.py", *given, "--deepspeed", f"plain{stage}.json")
    assert_same_run(ours, theirs)
    assert logged(ours)["eval_accuracy"] == logged(theirs)["eval_accuracy"]
    assert (ours / "predictions.txt").read_text() == (theirs / "predictions.txt").read_text()
    best = [json.loads((folder / "trainer_state.json").read_text()) for folder in (ours, theirs)]
    assert best[0]["best_global_step"] == best[1]["best_global_step"]
    assert len(list(ours.glob("checkpoint-*"))) <= 2  # the newest, and the best
