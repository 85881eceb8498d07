"""The config of a run of Lightning's: what the program gave, with what the Trainer was told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from partita.config import ConfigError, read_object

# How a precision of Lightning's is said in the config.
PRECISIONS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "16-mixed": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "bf16-mixed": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "16-true": {"fp16": {"enabled": True}},
    "bf16-true": {"bf16": {"enabled": True}},
}
ADVICE = "leave one of them out"

ConfigSource = Mapping[str, Any] | str | os.PathLike[str] | None


def read_config(source: ConfigSource) -> dict[str, Any]:
    """The config as a dict of its own; None: an empty one.

    Raises:
        ConfigError: the file is missing or is no object of JSON or YAML, or the source is something else.
        ValueError: the config asks for what is Lightning's here.
    """
    if source is not None and not isinstance(source, (Mapping, str, os.PathLike)):
        raise ConfigError(f"PartitaStrategy(config=) is a dict or the path of a file; got a {type(source).__name__}")
    settings = dict(deepcopy(source)) if isinstance(source, Mapping) else read_object(source) if source else {}
    checkpoint = settings.get("checkpoint") or {}
    for key, instead in (
        ("dir", "ModelCheckpoint saves, and `ckpt_path` resumes"),
        ("async_save", "ModelCheckpoint removes older checkpoints as soon as it has saved"),
    ):
        if isinstance(checkpoint, Mapping) and checkpoint.get(key):
            raise ValueError(f"PartitaStrategy: the config has checkpoint.{key}: leave it out, as {instead}")
    return settings


def with_precision(settings: dict[str, Any], precision: str) -> dict[str, Any]:
    """The config in a precision of Lightning's; "32-true" leaves it as it is, as that is what nobody asked for.

    Raises:
        ValueError: the config enables another one.
    """
    asked = PRECISIONS[precision]
    now = precision_of(settings)
    if precision != now and "32-true" not in (precision, now):
        raise ValueError(f"Trainer(precision={precision!r}), and the config says {now!r}: {ADVICE}")
    return {**settings, **asked} if now == "32-true" else settings


def precision_of(settings: Mapping[str, Any]) -> str:
    """The precision of a config in Lightning's words."""
    enabled = [name for name in ("fp16", "bf16", "torch_autocast") if _is_on(settings.get(name))]
    if not enabled:
        return "32-true"
    if enabled[0] != "torch_autocast":
        return "16-true" if enabled[0] == "fp16" else "bf16-true"
    return "16-mixed" if settings["torch_autocast"].get("dtype") in ("float16", "fp16") else "bf16-mixed"


def _is_on(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("enabled") is True


def for_training(
    settings: dict[str, Any], *, micro_batch: int | None, accumulation: int, clipping: float | None
) -> dict[str, Any]:
    """The config with what the Trainer was told.

    Args:
        micro_batch: samples in a batch of the data loader; None: not known.
        accumulation: the Trainer's `accumulate_grad_batches`.
        clipping: the Trainer's `gradient_clip_val`.

    Raises:
        ValueError: the config says otherwise; names both.
    """
    told = {
        "gradient_accumulation_steps": ("accumulate_grad_batches", accumulation),
        "gradient_clipping": ("gradient_clip_val", clipping),
        "train_micro_batch_size_per_gpu": ("the batch size of the data loader", micro_batch),
    }
    filled = {"steps_per_print": 0, **settings}  # Lightning has a progress bar
    for key, (name, value) in told.items():
        given = filled.get(key)
        if given in (None, "auto"):
            filled.pop(key, None)
            if value is not None:
                filled[key] = value
        elif value is not None and given != value:
            raise ValueError(f"{name} is {value}, and the config's {key} is {given}: {ADVICE}")
    if not {"train_micro_batch_size_per_gpu", "train_batch_size"} & filled.keys():
        filled["train_micro_batch_size_per_gpu"] = 1  # only reports speak of it
    return filled


def for_evaluation(settings: dict[str, Any]) -> dict[str, Any]:
    """The config of an engine that does not train."""
    left_out = ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    kept = {key: value for key, value in settings.items() if key not in left_out}
    return {**kept, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 0}


def stage_of(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a config."""
    return int((settings.get("zero_optimization") or {}).get("stage", 0))
