"""Checkpoints of a Trainer that are there as a whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

UNFINISHED = ".unfinished"  # where a run writes a checkpoint, in the folder in which the checkpoint will be


def unfinished_in(folder: str) -> Path:
    """An empty place for the next checkpoint: what a killed run has left there is gone."""
    place = Path(folder) / UNFINISHED
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def publish(folder: str, name: str, state: TrainerState) -> Path:
    """The checkpoint of this name, which is complete, appears in the folder, in the place of an older one of the name.

    Args:
        state: of the trainer; it is written again if it names this checkpoint as the best one, by its name until now.
    """
    made, place = Path(folder) / UNFINISHED / name, Path(folder) / name
    if rename_best(state, folder):
        state.save_to_json(str(made / TRAINER_STATE_NAME))
    if place.exists():
        place.rename(made.parent / "replaced")
    made.rename(place)
    shutil.rmtree(made.parent)
    return place


def rename_best(state: TrainerState, folder: str) -> bool:
    """The state names the best checkpoint by the name that lasts; whether it did not."""
    best = state.best_model_checkpoint
    if best is None or Path(best).parent.name != UNFINISHED:
        return False
    state.best_model_checkpoint = str(Path(folder) / Path(best).name)
    return True
