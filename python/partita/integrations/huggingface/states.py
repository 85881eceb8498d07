"""What engines add to `save_state()` and `load_state()`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from partita import Engine
from partita.integrations.huggingface.optimizer import PartitaOptimizer

FOLDER = "partita"  # of the engine's checkpoint in a folder of Accelerate's or Trainer's


class EngineStates:
    """Hooks of an accelerator: the engines among its models save and load themselves, with their optimizers.

    Args:
        accelerator: with `_models` and `_optimizers`, as Accelerate has them.

    Attributes:
        is_saving: whether `save_state()` asks for the models' state dicts, and engines have none to give.
    """

    def __init__(self, accelerator: Any) -> None:
        self.is_saving = False
        self._accelerator = accelerator
        self._saved_in: str | None = None
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The block in which `save_state()` runs."""
        self.is_saving = True
        try:
            with self._without_optimizers():
                yield
        finally:
            self.is_saving = False

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The block in which `load_state()` runs."""
        with self._without_optimizers():
            yield

    @contextmanager
    def _without_optimizers(self) -> Iterator[None]:
        optimizers = self._accelerator._optimizers
        self._accelerator._optimizers = [o for o in optimizers if not isinstance(o, PartitaOptimizer)]
        try:
            yield
        finally:
            self._accelerator._optimizers = optimizers

    def _save(self, models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        for place in reversed(range(len(models))):
            if isinstance(engine := models[place], Engine):
                save(engine, output_dir, place, self._saved_in)
                del weights[place]
        self._saved_in = output_dir

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        for place in reversed(range(len(models))):
            if isinstance(engine := models[place], Engine):
                engine.load_checkpoint(input_dir, _tag(place))
                del models[place]


def save(engine: Engine, folder: str, place: int = 0, earlier: str | None = None) -> None:
    """The engine's checkpoint is in the folder, and complete. A collective.

    Args:
        earlier: a folder with an earlier one, whose frozen parameters are not written again.
    """
    before = None if earlier is None else Path(earlier) / _tag(place)
    engine.save_checkpoint(folder, _tag(place), save_latest=False, earlier=before)
    engine.wait_for_save()


def _tag(place: int) -> str:
    return f"{FOLDER}_{place}" if place else FOLDER
