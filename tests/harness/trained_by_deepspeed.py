"""A program of DeepSpeed's by way of Hugging Face: Trainer and Accelerator, with a config of DeepSpeed's.

    python trained_by_deepspeed.py FOLDER STAGES [SETTINGS]

It knows nothing of Partita, and runs with DeepSpeed where that is installed. Rank 0 writes FOLDER/figures.json: what
the runs of each stage reported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

FOLDER, STAGES = Path(sys.argv[1]), [int(stage) for stage in sys.argv[2].split(",")]
SETTINGS = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
STEPS, HALF, ACCUMULATION = SETTINGS.get("steps", 6), SETTINGS.get("half", 3), 2


def model_of() -> GPT2LMHeadModel:
    """Tiny, tied, the same on every call. In stage 3 built partitioned."""
    set_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), SETTINGS.get("dropout", 0.0))
    return GPT2LMHeadModel._from_config(GPT2Config(**sizes, **ends, **drops))


def data_of(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (12,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def config_of(stage: int) -> dict[str, Any]:
    """As Hugging Face's pages write it."""
    zero = {"stage": stage, "overlap_comm": False, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    adam = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    decay = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(batch, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {**zero, **dict.fromkeys(sizes, "auto")},
        "steps_per_print": float("inf"),
        **({"optimizer": {"type": "AdamW", "params": adam}} if stage in (1, 3) else {}),
        **({"scheduler": {"type": "WarmupDecayLR", "params": decay}} if stage == 1 else {}),
    }


def forget() -> None:
    """The next Accelerator has a config of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer_of(stage: int, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config_of(stage),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2,
        logging_steps=1,
        save_steps=HALF,
        report_to=[],
        disable_tqdm=True,
        bf16=SETTINGS.get("bf16", False),
    )
    return Trainer(model=model_of(), args=arguments, train_dataset=data_of(64), eval_dataset=data_of(5))


def train(stage: int, folder: Path, resume: bool = False) -> dict[str, Any]:
    trainer = trainer_of(stage, folder)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    last = folder / ("resumed" if resume else "unbroken")
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(last))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    forget()
    figures = {name: [row.get(name) for row in rows] for name in ("loss", "grad_norm", "learning_rate")}
    return {**figures, "eval_loss": evaluated}


def by_hand(stage: int, folder: Path, resume: bool = False) -> dict[str, Any]:
    """A loop over an Accelerator, whose state is saved at half of the steps."""
    config = config_of(stage) | {"gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 1.0}
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    PartialState(cpu=True)  # without a GPU, Accelerate sees the ranks only if it is told so
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(data_of(64), batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses, norms, steps = [], [], 0
    if resume:
        accelerator.load_state(str(folder / "state"))
        loader, steps = accelerator.skip_first_batches(loader, HALF * ACCUMULATION), HALF
    model.train()
    for batch in loader:
        if steps == STEPS:
            break
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        steps += accelerator.sync_gradients
        if accelerator.sync_gradients and steps == HALF and not resume:
            accelerator.save_state(str(folder / "state"))
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(state, folder / f"accelerated-{resume}.pt")
    rate = optimizer.param_groups[0]["lr"]
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    forget()
    return {"loss": losses, "grad_norm": norms, "learning_rate": rate}


def main() -> None:
    figures: dict[str, Any] = {}
    for stage in STAGES:
        folder = FOLDER / f"stage{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        own = figures[str(stage)] = {"trainer": train(stage, folder), "accelerator": by_hand(stage, folder)}
        if SETTINGS.get("resume", True):
            own["trainer again"] = train(stage, folder, resume=True)
            own["accelerator again"] = by_hand(stage, folder, resume=True)
    if int(torch.distributed.get_rank()) == 0:
        (FOLDER / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
