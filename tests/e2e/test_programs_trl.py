"""Programs for TRL with a DeepSpeed config, unchanged through `partita run`: SFT and DPO as by TRL alone, LoRA too."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Programs, logged, save_config, save_gpt2, sentence
from safetensors.torch import load_file
from warm_python import WarmPython

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

COMMON = [
    *("--model_name_or_path", "gpt2", "--use_cpu", "--report_to", "none", "--logging_steps", 1, "--max_steps", 4),
    *("--learning_rate", 1e-2, "--seed", 5, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 3),
    *("--max_length", 24, "--dtype", "float32", "--bf16", "false", "--gradient_checkpointing", "false"),
    *("--save_strategy", "no"),
]
LORA = ["--use_peft", "--lora_r", 2, "--lora_alpha", 4, "--lora_target_modules", "c_attn", "c_fc"]
LOGGED = {
    "sft": ("loss", "grad_norm", "mean_token_accuracy", "eval_loss"),
    "dpo": ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "eval_loss"),
}


@pytest.fixture(scope="module")
def programs(python: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """With a model, dialogues, preferences and configs `plain0.json` ... `plain3.json` in its folder."""
    folder = tmp_path_factory.mktemp("programs")
    save_gpt2(folder / "gpt2")
    generator = random.Random(1)

    def said(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": sentence(generator, 9)}]

    dialogues = [{"messages": said("user") + said("assistant")} for _ in range(30)]
    chosen = [{"prompt": said("user"), "chosen": said("assistant"), "rejected": said("assistant")} for _ in range(30)]
    for name, rows in (("sft", dialogues), ("dpo", chosen)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for stage in range(4):
        save_config(folder / f"plain{stage}.json", stage, zero_allow_untested_optimizer=True)
    return Programs(python, folder)


def out(programs: Programs, kind: str, name: str, *more: Any, **how: Any) -> Path:
    """The folder that the program wrote to; run once."""
    folder = programs.folder / f"{kind}-{name}"
    if not folder.exists():
        given = [kind, "--dataset_name", f"{kind}.jsonl", *COMMON, *more, "--output_dir", folder]
        programs.run("dialogues.py", *given, **how)
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_as_by_trl_alone(programs, kind, stage, ranks, lora):
    """DPO has a model to refer to beside the trained one: in stage 3 both are partitioned."""
    more = LORA if lora else []
    theirs = out(programs, kind, f"alone-{ranks}-{lora}", *more, ranks=ranks, partita=False)
    given = ["--deepspeed", f"plain{stage}.json", *more]
    ours = out(programs, kind, f"{stage}-{ranks}-{lora}", *given, ranks=ranks)
    mine, other = logged(ours), logged(theirs)
    assert len(mine["loss"]) == 4
    for name in LOGGED[kind]:
        assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    weights, expected = load_file(ours / file), load_file(theirs / file)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-3, msg=name)
