"""DeepSpeed's `runtime.config`."""

from __future__ import annotations

import os
from typing import Any

from partita.compat.deepspeed._absent import absent_names
from partita.compat.deepspeed._config import as_dict, translated
from partita.config import ConfigError as DeepSpeedConfigError
from partita.config import load_config, resolve_batch_sizes

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]


class DeepSpeedConfig:
    """A config, checked, with its batch sizes filled in; its other attributes are those of `partita.Config`.

    Args:
        config: a dict, the path of a JSON file, or the JSON in base64.
        mpu: None.
        mesh_device: None.

    Raises:
        DeepSpeedConfigError: it does not make sense; names every key at fault.
        ValueError: an argument asks for what is not there; names it.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        for name, value in (("mpu", mpu), ("mesh_device", mesh_device)):
            if value is not None:
                raise ValueError(f"DeepSpeedConfig: {name}: there is no model or sequence parallelism; leave it out")
        self._param_dict = as_dict(config)
        self._config = load_config(translated(config))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        batch = resolve_batch_sizes(
            train=self._config.train_batch_size,
            micro=self._config.train_micro_batch_size_per_gpu,
            accumulation=self._config.gradient_accumulation_steps,
            world_size=self.world_size,
        )
        self.train_batch_size = batch.train
        self.train_micro_batch_size_per_gpu = batch.micro
        self.gradient_accumulation_steps = batch.accumulation
        self.zero_config = self._config.zero_optimization
        self.zero_optimization_stage = self.zero_config.stage
        self.monitor_config = self._config  # what MonitorMaster takes
        self.zero_enabled = self.zero_config.stage > 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._config, name)


__getattr__ = absent_names(__name__)
