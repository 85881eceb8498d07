"""What the config asks to see of a run beside its reports: FLOPs, collectives, memory, a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from partita.comm import raise_together
from partita.model import ModelPart
from partita.monitor.comms_log import CommsLog, CommsRow, comms_text
from partita.monitor.flops_profile import FlopsProfile
from partita.monitor.memory import breakdown_text, model_states
from partita.monitor.timers import PhaseTimers
from partita.monitor.trace import Trace
from partita.monitor.written import place_for
from partita.run import Run

logger = logging.getLogger("partita")

MEMORY_AFTER = (1, 2)  # steps: the states of an optimizer come with the first one


class Watching:
    """Whoever watches a run as the config says. Of what it does not ask for, there is nothing.

    Args:
        parts: what this rank trains.
        timers: tell of phases.
        steps: so far.
        exits: ends it.

    Raises:
        ValueError: a file of the config cannot be written; on all ranks.
    """

    def __init__(self, run: Run, parts: Sequence[ModelPart], timers: PhaseTimers, steps: int, exits: ExitStack) -> None:
        config, model = run.config, _as_one(parts)
        self._run, self._parts = run, list(parts)
        places = self._places()
        self._comms: CommsLog | None = None
        self._flops: FlopsProfile | None = None
        self._trace: Trace | None = None
        if config.comms_logger.enabled:
            self._comms = CommsLog(config.comms_logger, run.streams, speaks=run.is_first)
            run.grid.listeners.append(self._comms.add)
        if config.flops_profiler.enabled and run.is_first:
            self._flops = FlopsProfile(
                config.flops_profiler,
                model,
                run.streams,
                samples=run.batch.micro,
                micro_batches=run.batch.accumulation,
                steps=steps,
                path=places.get("flops_profiler.output_file"),
            )
            timers.around.append(self._flops.around)
            exits.callback(self._flops.tell)
        if config.trace is not None:
            path = places.get("trace.path")
            self._trace = Trace(config.trace.steps, path, model, run.grid.world, run.grid.listeners)
            timers.around.append(self._trace.around)
            exits.callback(self._trace.close)
            self._trace.begin(steps)
        exits.callback(self._parts.clear)
        if config.memory_breakdown:
            self._tell_memory(steps)

    def after_update(self, step: int) -> None:
        """A step was taken, the one with this number; on a GPU its work was queued."""
        if self._flops is not None:
            self._flops.after_update(step)
        if self._trace is not None:
            self._trace.after_update(step)
        config = self._run.config
        if config.memory_breakdown and (step in MEMORY_AFTER or step % (config.steps_per_print or step + 1) == 0):
            self._tell_memory(step)

    def add_actions(self, actions: Iterable[tuple[str, float, float]]) -> None:
        """Actions of a pipeline: names, begins and ends in seconds of `time.perf_counter`."""
        if self._trace is not None:
            self._trace.add_actions(actions)

    def log_comms(self) -> list[CommsRow]:
        """What the communicators of this rank carried so far; rank 0 prints it.

        Raises:
            RuntimeError: the config does not ask for it.
        """
        if self._comms is None:
            raise RuntimeError('log_comms(): nothing was kept: set "comms_logger": {"enabled": true} in the config')
        rows = self._comms.rows()
        if self._run.is_first:
            logger.info("what rank 0 has sent and received:\n%s", comms_text(rows))
        return rows

    def _places(self) -> dict[str, Path]:
        """Where files go, on rank 0."""
        config = self._run.config
        asked: dict[str, str | None] = {}
        if config.trace is not None:
            asked["trace.path"] = config.trace.path
        if config.flops_profiler.enabled:
            asked["flops_profiler.output_file"] = config.flops_profiler.output_file
        if not asked:
            return {}
        error: ValueError | None = None
        places: dict[str, Path] = {}
        try:
            if self._run.is_first:
                places = {key: place_for(key, path) for key, path in asked.items() if path is not None}
        except ValueError as failure:
            error = failure
        raise_together(self._run.grid.world, error, "a file of the config:")
        return places

    def _tell_memory(self, step: int) -> None:
        if self._run.is_first:
            logger.info(breakdown_text(step, model_states(self._parts), self._run.device))


def _as_one(parts: Sequence[ModelPart]) -> nn.Module:
    """The module of the only part, or a container of the chunks of a pipeline."""
    if len(parts) == 1:
        return parts[0].module
    return nn.ModuleDict({f"chunk {i}": part.module for i, part in enumerate(parts)})
