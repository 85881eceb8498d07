"""One training by Trainer or Accelerate, over one engine: a rank of `trainer.py`, which starts them with torchrun.

    torchrun --nproc-per-node 2 bench/peers/trainer_run.py --library trainer --engine partita --stage 1 --json FILE

The file gets the losses of all steps (the mean over ranks) and the ms of each step on the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import Ranks  # isort: skip  (it sets up the process for torch)
import torch
from torch import Tensor

VOCABULARY, LENGTH, BATCH = 4096, 64, 2
LEARNING_RATE, CLIP = 1e-3, 1.0
ENGINES = ("partita", "alias", "deepspeed", "ddp")


@dataclass
class Course:
    """What is written down of a training."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # s, of each step

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.ends.append(time.perf_counter())


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2**22, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def build_model() -> Any:
    """4.3 million parameters, the same in each process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    numbers = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 256, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**size, **still, **numbers))


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def require(engine: str, model: Any) -> None:
    """Ends the program if another engine trains than was asked for: libraries fall back to DDP without a word."""
    kind = type(model)
    package = {"partita": "partita.engine", "alias": "partita.compat", "deepspeed": "deepspeed", "ddp": "torch"}[engine]
    if not kind.__module__.startswith(package):
        sys.exit(f"{engine} was asked for, and a {kind.__module__}.{kind.__name__} trains")


def by_trainer(engine: str, stage: int, samples: Samples, steps: int, folder: str) -> Course:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    course = Course()

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                course.step(logs["loss"])

    own = {"deepspeed": config_of(stage)} if engine in ("alias", "deepspeed") else {}
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=3, **own,
    )  # fmt: skip
    trainer_class, more = Trainer, {}
    if engine == "partita":
        from partita.integrations.huggingface import PartitaTrainer

        trainer_class, more = PartitaTrainer, {"partita_config": config_of(stage)}
    trainer = trainer_class(model=build_model(), args=arguments, train_dataset=samples, callbacks=[Notes()], **more)
    trainer.train()
    require(engine, trainer.model_wrapped)
    return course


def by_accelerate(engine: str, stage: int, samples: Samples, steps: int, folder: str) -> Course:
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState

    if engine == "partita":
        from partita.integrations.huggingface import PartitaAccelerator

        accelerator: Any = PartitaAccelerator(partita_config=config_of(stage), cpu=True)
    elif engine == "ddp":
        accelerator = Accelerator(cpu=True)
    else:
        PartialState(cpu=True)  # Accelerator(cpu=True) would leave DeepSpeed out without a word
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(stage)))
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(samples, batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    require(engine, model)
    course = Course()
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        course.step(accelerator.gather(loss.detach()).mean().item())
    return course


LIBRARIES: dict[str, Callable[[str, int, Samples, int, str], Course]] = {
    "trainer": by_trainer,
    "accelerate": by_accelerate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    ranks = Ranks()
    if given.engine == "alias":
        import partita.compat.deepspeed.auto  # noqa: F401
    samples = Samples(given.steps * BATCH * ranks.world_size)
    folder = str(given.json.parent)
    course = LIBRARIES[given.library](given.engine, given.stage, samples, given.steps, folder)
    seconds = [end - start for start, end in zip(course.ends, course.ends[1:], strict=False)]
    result = {"losses": [ranks.mean(x) for x in course.losses], "ms": [ranks.largest(x) * 1e3 for x in seconds]}
    if ranks.rank == 0:
        given.json.write_text(json.dumps(result))
    sys.stdout.flush()
    ranks.finish()


if __name__ == "__main__":
    main()
