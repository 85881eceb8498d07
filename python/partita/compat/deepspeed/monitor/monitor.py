"""The sinks that a config asks for, written by the program itself; `engine.log()` is the shorter way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from partita.comm import place_in_job
from partita.compat.deepspeed._absent import absent_names
from partita.config import load_config
from partita.monitor import Record, make_sinks

__all__ = ["MonitorMaster"]


class MonitorMaster:
    """Writes values to TensorBoard, CSV files, Weights & Biases and Comet, on rank 0.

    Args:
        monitor_config: `DeepSpeedConfig(...).monitor_config`; or a whole config as `initialize()` takes it.

    Attributes:
        enabled: whether there is a sink, on any rank.

    Raises:
        ConfigError: a sink cannot begin; names its section.
    """

    def __init__(self, monitor_config: Any) -> None:
        config = load_config(dict(monitor_config) if isinstance(monitor_config, Mapping) else monitor_config)
        self.enabled = config.records_steps
        self._sinks = make_sinks(config) if place_in_job()[0] == 0 else []

    def write_events(self, event_list: Iterable[tuple[str, Any, int]], flush: bool = True) -> None:
        """Writes (name, value, samples) triples.

        Args:
            flush: without effect; what is written is there.
        """
        by_samples: dict[int, dict[str, float]] = {}
        for name, value, samples in event_list:
            by_samples.setdefault(int(samples), {})[name] = float(value)
        records = [
            Record(step=0, samples=samples, values=values, is_own=False, time_s=time.time())
            for samples, values in by_samples.items()
        ]
        for sink in self._sinks:
            sink.write(records)


__getattr__ = absent_names(__name__)
