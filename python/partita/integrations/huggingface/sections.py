"""The sections `optimizer` and `scheduler` of a config, in the place of what Trainer makes from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from transformers import TrainingArguments

from partita.config import ConfigError, load_config
from partita.integrations.huggingface.settings import Said, filled
from partita.optim import make_optimizer, make_scheduler


def optimizer_of(section: Mapping[str, Any], groups: list[dict[str, Any]], args: TrainingArguments) -> Optimizer:
    """The optimizer that a config names, over the param groups of Trainer's own: with and without decay.

    Raises:
        ConfigError: the config contradicts the arguments, or there is no such optimizer.
    """
    said = {
        "lr": _said(args, "learning_rate"),
        "betas": Said("adam_beta1 and adam_beta2 of TrainingArguments", [args.adam_beta1, args.adam_beta2]),
        "eps": _said(args, "adam_epsilon"),
        "weight_decay": _said(args, "weight_decay"),
    }
    decayed, *others = [{"params": group["params"]} for group in groups]
    try:
        params = _params("optimizer", section, said)
        return make_optimizer(section["type"], params, [decayed, *({**other, "weight_decay": 0.0} for other in others)])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def schedule_of(section: Mapping[str, Any], optimizer: Optimizer, args: TrainingArguments, steps: int) -> Any:
    """The schedule that a config names, over the optimizer in training.

    Args:
        steps: of the whole training.

    Raises:
        ConfigError: the config contradicts the arguments, or there is no such schedule.
    """
    said = {
        "warmup_min_lr": Said("the start of a warm-up", 0.0),
        "warmup_max_lr": _said(args, "learning_rate"),
        "warmup_num_steps": Said("warmup_steps of TrainingArguments", max(2, args.get_warmup_steps(steps))),
        "total_num_steps": Said("max_steps or num_train_epochs of TrainingArguments", steps),
    }
    try:
        return make_scheduler(section["type"], _params("scheduler", section, said), optimizer)
    except ValueError as error:
        raise ConfigError(f"scheduler: {error}") from None


def require_sections(sections: Mapping[str, Any]) -> None:
    """Raises ConfigError if a section is none of a config, or names what is not there."""
    given = {name: section for name, section in sections.items() if section is not None}
    load_config({"train_micro_batch_size_per_gpu": 1, **given})


def _params(name: str, section: Mapping[str, Any], said: Mapping[str, Said]) -> dict[str, Any]:
    params = dict(section.get("params") or {})
    for key in params:
        if key in said:
            params[key] = filled(params, key, said[key], f"{name}.params.")
        elif params[key] == "auto":
            raise ConfigError(f'{name}.params.{key} = "auto": TrainingArguments do not say it; give a value')
    return params


def _said(args: TrainingArguments, name: str) -> Said:
    return Said(f"{name} of TrainingArguments", getattr(args, name))
