"""The engine's config from a config of the program and from arguments of Accelerate or Trainer; pure."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from partita.config import ConfigError, read_object

if TYPE_CHECKING:
    from partita.config import Config

PartitaConfig: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | Config | None"

_MICRO, _ACCUMULATION, _TRAIN = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Said:
    """A value that the program gives beside the config. name: of the argument, for people."""

    name: str
    value: Any


@dataclass(frozen=True)
class Asked:
    """What the arguments of Accelerate or Trainer say; None: nothing.

    Attributes:
        world_size: number of ranks.
        micro_batch: samples that one rank puts through one forward.
        accumulation: micro-batches per step.
        precision: "no", "fp16" or "bf16".
        clipping: the largest norm of all gradients.
    """

    world_size: int
    micro_batch: Said | None = None
    accumulation: Said | None = None
    precision: Said | None = None
    clipping: Said | None = None


def read_config(source: PartitaConfig) -> dict[str, Any]:
    """The keys that a program has written. The caller owns the dict.

    Raises:
        ConfigError: the file cannot be read, or the source is something else.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    if isinstance(source, (str, os.PathLike)):
        return read_object(source)
    if hasattr(source, "model_dump"):
        return dict(source.model_dump(exclude_unset=True))
    raise ConfigError(f"partita_config is a dict or the path of a file; got a {type(source).__name__}")


def precision_in(config: Mapping[str, Any]) -> str | None:
    """The 16-bit type that a config enables: "fp16" or "bf16"; None: it enables none."""
    for name in _DTYPES:
        if _is_on(config, name):
            return name
    if _is_on(config, "torch_autocast"):
        dtype = str(config["torch_autocast"].get("dtype", "bfloat16")).removeprefix("torch.")
        return next((name for name, long in _DTYPES.items() if dtype in (name, long)), None)
    return None


def engine_config(given: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """The config of an engine that accumulates under Accelerate's direction: each of its steps has one micro-batch.

    What the config leaves out, or says as "auto", the arguments say.

    Raises:
        ConfigError: config and arguments contradict each other; names both.
    """
    config = copy.deepcopy(dict(given))
    accumulation = _sizes(config, asked)
    _precision(config, asked.precision)
    clipping = filled(config, "gradient_clipping", asked.clipping)
    if clipping is not None:
        config["gradient_clipping"] = clipping
    if accumulation > 1:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.setdefault("steps_per_print", 0)  # whoever trains with these classes has a log
    _refuse_own_run(config)
    _refuse_schedule(config)
    return config


def accumulation_of(config: Mapping[str, Any]) -> int | None:
    """Micro-batches per step that a config gives as a number; None: it does not."""
    value = config.get(_ACCUMULATION)
    return value if isinstance(value, int) else None


def _sizes(config: dict[str, Any], asked: Asked) -> int:
    """Takes the sizes of a step out of the config, and puts those of a micro-batch in; the micro-batches of a step."""
    accumulation = int(filled(config, _ACCUMULATION, asked.accumulation) or 1)
    micro = filled(config, _MICRO, asked.micro_batch)
    train = filled(config, _TRAIN, None)
    per_sample = accumulation * asked.world_size
    if train is not None and micro is None:
        if train % per_sample:
            raise ConfigError(
                f"{_TRAIN} = {train} (from the config) cannot be split into {accumulation} micro-batches "
                f"({_said(asked.accumulation, _ACCUMULATION)}) on {asked.world_size} ranks: make it a multiple of "
                f"{per_sample}"
            )
        micro = train // per_sample
    if train is not None and train != micro * per_sample:
        raise ConfigError(
            f"{_TRAIN} = {train} (from the config) is not {micro} ({_said(asked.micro_batch, _MICRO)}) x "
            f"{accumulation} ({_said(asked.accumulation, _ACCUMULATION)}) x {asked.world_size} ranks = "
            f'{micro * per_sample}: leave {_TRAIN} out, or say "auto"'
        )
    for key in (_TRAIN, _MICRO):
        config.pop(key, None)
    if micro is not None:
        config[_MICRO] = micro
    config[_ACCUMULATION] = 1
    return accumulation


def _precision(config: dict[str, Any], said: Said | None) -> None:
    if said is None:
        return
    if said.value not in ("no", *_DTYPES):
        raise ConfigError(f"{said.name} = {said.value!r}: Partita trains in fp32, fp16 and bf16")
    enabled = [name for name in (*_DTYPES, "torch_autocast") if _is_on(config, name)]
    found = precision_in(config) or "no"
    if enabled and found != said.value:
        raise ConfigError(
            f"{enabled[0]}.enabled is true in the config, and {said.name} = {said.value!r}: make them agree, or leave "
            f"{enabled[0]} out of the config"
        )
    if enabled or said.value == "no":
        for name in _DTYPES:
            if _section(config, name).get("enabled") == "auto":
                config[name] = {**config[name], "enabled": name in enabled}
        return
    section = _section(config, said.value)
    if section.get("enabled") not in (None, "auto"):
        raise ConfigError(
            f"{said.value}.enabled is false in the config, and {said.name} = {said.value!r}: leave it out, or say "
            '"auto"'
        )
    for name in _DTYPES:
        if name == said.value or _section(config, name).get("enabled") == "auto":
            config[name] = {**_section(config, name), "enabled": name == said.value}


def _refuse_own_run(config: Mapping[str, Any]) -> None:
    if _section(config, "checkpoint").get("dir") is not None:
        raise ConfigError(
            "checkpoint.dir is in the config, so the engine would save and resume on its own, beside save_state() or "
            "Trainer's checkpoints: leave it out"
        )


def _refuse_schedule(config: Mapping[str, Any]) -> None:
    if config.get("scheduler") is not None:
        raise ConfigError(
            "scheduler is in the config, and the program has a schedule of its own (lr_scheduler_type of Trainer, the "
            "scheduler that comes to prepare()): leave one of them out"
        )


def filled(config: Mapping[str, Any], key: str, said: Said | None, section: str = "") -> Any:
    """The value of a key: the config's, or where it has none or "auto" the argument's.

    Args:
        section: in which the key is, for people.

    Raises:
        ConfigError: both say something, and not the same; names both.
    """
    value = config.get(key)
    if value is None or value == "auto":
        return None if said is None else said.value
    if said is not None and value != said.value:
        raise ConfigError(
            f"{section}{key} = {value} in the config, and {said.name} = {said.value}: make them equal, or say "
            f'"auto" in the config'
        )
    return value


def _said(said: Said | None, key: str) -> str:
    return f"{key} in the config" if said is None else said.name


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_on(config: Mapping[str, Any], name: str) -> bool:
    return _section(config, name).get("enabled") is True
