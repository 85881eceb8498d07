"""Programs of Hugging Face for tests: ranks as a launcher starts them, a tiny GPT-2, its data, runs of a trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
LOGGED = ("loss", "grad_norm", "learning_rate")


@contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun would have given to this rank; Accelerate knows nothing of earlier tests."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with patch.dict(os.environ, {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "HF_HUB_OFFLINE": "1"}):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def gpt2(**changes: Any) -> Any:
    """With tied weights and with dropout; the same on every call."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SIZES, **changes}, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config)


class Texts(Dataset[dict[str, Tensor]]):
    """Samples with different numbers of tokens that count; no number of ranks and samples divides theirs."""

    def __len__(self) -> int:
        return 53

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 40, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 9] = -100
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Seen:
    """What a run has logged. steps: loss, gradient norm and learning rate of each; evaluations: their losses."""

    trainer: Any
    steps: list[tuple[float, ...]]
    evaluations: list[float]


def run(
    cls: type[Any],
    folder: str,
    model: nn.Module | None = None,
    resume: str | bool | None = None,
    given: dict[str, Any] | None = None,
    **arguments: Any,
) -> Seen:
    """Trains; `given` goes to the trainer, `arguments` to TrainingArguments."""
    trainer = trainer_of(cls, folder, model, given, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    logs = trainer.state.log_history
    steps = [tuple(float(log[name]) for name in LOGGED) for log in logs if "loss" in log]
    return Seen(trainer, steps, [float(log["eval_loss"]) for log in logs if "eval_loss" in log])


def trainer_of(
    cls: type[Any],
    folder: str,
    model: nn.Module | None = None,
    given: dict[str, Any] | None = None,
    *,
    has_model: bool = True,
    **arguments: Any,
) -> Any:
    """A trainer before `train()`, of `gpt2()` unless another model is given, or none: `has_model`."""
    from transformers import TrainingArguments

    data: dict[str, Any] = {"train_dataset": Texts(), "eval_dataset": Texts(), **(given or {})}
    kind = data.pop("arguments_class", TrainingArguments)
    defaults = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "warmup_steps": 2, "save_strategy": "no"}
    args = kind(
        folder,
        **{**defaults, **arguments},
        use_cpu=True,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
    )
    return cls((gpt2() if model is None else model) if has_model else None, args, **data)


def stage(number: int, **changes: Any) -> dict[str, Any]:
    """For a trainer or an accelerator: `partita_config` of a ZeRO stage, all parameters partitioned in stage 3."""
    zero = {"stage": number, "stage3_param_persistence_threshold": 0}
    return {"partita_config": {"zero_optimization": zero, **changes}}


def furthest(actual: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> float:
    """The largest difference."""
    assert len(actual) == len(expected)
    return max(abs(a - b) for pair in zip(actual, expected, strict=True) for a, b in zip(*pair, strict=True))
