"""Loading: every rank reads its own parts, whatever ranks, stage and precision the checkpoint was saved with."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from partita.checkpoint.agreement import from_rank_0, together
from partita.checkpoint.audit import Event
from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import Found, find
from partita.checkpoint.manifest import manifest_text, parse_manifest
from partita.checkpoint.names import stored_names
from partita.checkpoint.protection import PLAIN, Protection, event_of
from partita.checkpoint.saved_state import STATE, SavedState, parse_state
from partita.checkpoint.stored import Stored, read_whole
from partita.checkpoint.values import ValueReader
from partita.comm import require_same, text_by_rank
from partita.model import DiffersByRank, KeepsValues, Section, TrainState, from_plain
from partita.optim import HyperParameters

logger = logging.getLogger("partita")

# Sections of the training state that a caller may leave out.
OPTIMIZER, OPTIMIZER_STATES, SCHEDULE = "optimizer", "optimizer_states", "lr_scheduler"


@dataclass(frozen=True)
class Wanted:
    """What is loaded beside the weights: `sections` at all, and of these the optimizer's and the schedule's.

    strict: the names of the model and of the checkpoint are the same.
    """

    sections: bool = True
    optimizer: bool = True
    schedule: bool = True
    strict: bool = True

    def takes(self, section: str) -> bool:
        """Whether a section of the training state is loaded."""
        if section in (OPTIMIZER, OPTIMIZER_STATES):
            return self.sections and self.optimizer
        return self.sections and (self.schedule or section != SCHEDULE)


@torch.inference_mode(mode=False)  # what is made now is trained later
def load(
    state: TrainState, directory: Path, tag: str | None, wanted: Wanted, protection: Protection = PLAIN
) -> tuple[Path, Any]:
    """Takes the state of a checkpoint; returns its path and the program's own state. A collective.

    Args:
        tag: None: what `directory/latest` names.
        protection: the key of an encrypted checkpoint. The audit log says what was loaded, or refused.

    Raises:
        RuntimeError: in the midst of a step.
        ValueError: the ranks were not given the same.
        CheckpointError: there is no such checkpoint, it is damaged, or it does not fit; on all ranks alike. Nothing
            has changed, unless `state.is_torn`: then a file was changed, or could not be read any more, after it had
            been found to be sound.
    """
    world = state.world
    require_same(world, [("load_dir", str(directory)), ("tag", str(tag)), ("what is loaded", str(wanted))])
    state.require_idle("a checkpoint is loaded")
    if not wanted.strict:
        state.adopt_written_parameters()  # parameters that the checkpoint does not have keep what was written
    try:
        found, client_state = _load(state, directory, tag, wanted, protection)
    except CheckpointError:
        if world.rank == 0:
            protection.tell(directory, Event("refused", tag or ""))
        raise
    if world.rank == 0:
        protection.tell(directory, event_of("loaded", found))
    return found.path, client_state


def _load(
    state: TrainState, directory: Path, tag: str | None, wanted: Wanted, protection: Protection
) -> tuple[Found, Any]:
    world = state.world
    what = f"the checkpoint in '{directory}' was not loaded"

    def look() -> str:
        found = find(Path(os.path.abspath(directory)), tag)
        if STATE not in found.manifest.files:
            raise CheckpointError(f"'{found.path}' has no {STATE} in its manifest: it was not written by Partita")
        cipher = protection.opened(found)
        small = read_whole(found.path, STATE, found.manifest.files[STATE], cipher).decode()
        return json.dumps([str(found.path), found.tag, manifest_text(found.manifest), small])

    path, its_tag, manifest_json, small = json.loads(from_rank_0(world, what, look))
    folder = Path(path)
    what = f"the checkpoint '{folder}' was not loaded"
    manifest, saved = together(
        world, what, lambda: (parse_manifest(manifest_json.encode(), path), parse_state(small.encode(), path))
    )
    found = Found(folder, its_tag, manifest)
    cipher = together(world, what, partial(protection.opened, found))
    names = stored_names(state, what)
    with together(world, what, partial(Stored, folder, manifest, cipher)) as stored:
        client_state = together(world, what, lambda: from_plain(saved.client_state))
        reader = together(world, what, partial(ValueReader, state, names, stored, saved, wanted.strict))
        states = together(world, what, partial(_sections, state, saved, wanted, reader))
        kept = [
            owner.values_of(states[name]) for name, owner in _keepers(state) if wanted.takes(name) and name in states
        ]
        together(world, what, lambda: reader.check(value for values in kept for value in values))
        state.load_sections(states, partial(together, world, what))
        with state.rewriting():
            together(world, f"the checkpoint '{folder}' was loaded in part, and the state is a mixture", reader.take)
        said = text_by_rank(world, json.dumps(reader.rounded))
        if world.rank == 0:
            logger.info(f"loaded '{folder}', step {manifest.step}; rank 0 read {reader.bytes_read:,} bytes")
            _warn_of_what_is_left(state, saved, wanted, folder)
            _warn_of_weights(reader, sorted({name for text in said for name in json.loads(text)}), folder)
            if any(wanted.takes(name) for name, _ in _keepers(state)):
                _say_what_is_not_trained(reader, folder)
    return found, client_state


def _sections(state: TrainState, saved: SavedState, wanted: Wanted, reader: ValueReader) -> dict[str, dict[str, Any]]:
    """The state that each section takes."""
    if not wanted.sections:
        return {}
    names = reader.names_before(saved)
    found = {s.name: _saved_by_ranks(s, state, saved, names) for s in state.sections if wanted.takes(s.name)}
    steps = _applied_steps(saved)
    states = {name: value for name, value in found.items() if value is not None}
    # Who wrote the checkpoint says by null that there is nothing to go on from.
    missing = next((name for name in found if name not in states and name not in saved.sections), None)
    if missing is not None and wanted.strict:
        raise CheckpointError(
            f"it has no state of '{missing}', which this run has: load_module_strict=False goes on without"
        )
    for name, owner in _keepers(state):
        left = reader.left_out(owner.values_of(states[name])) if name in states else reader.parameters
        kept = owner.keeping(states.get(name), left, steps)
        if kept is not None:
            states[name] = kept
    return _with_learning_rates(state, states)


def _with_learning_rates(state: TrainState, states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states, such that the optimizer has the learning rates of the schedule that it has from now on, where only
    one of the two is loaded: many schedules go on from what the optimizer has."""
    owners = {section.name: section.owner for section in state.sections}
    optimizer = owners.get(OPTIMIZER)
    if not isinstance(optimizer, HyperParameters) or SCHEDULE not in owners:
        return states
    if OPTIMIZER in states and SCHEDULE not in states:
        return {**states, OPTIMIZER: optimizer.without_schedule(states[OPTIMIZER])}
    if SCHEDULE in states and OPTIMIZER not in states:
        return {**states, OPTIMIZER: optimizer.under_schedule(states[SCHEDULE])}
    return states


def _warn_of_what_is_left(state: TrainState, saved: SavedState, wanted: Wanted, folder: Path) -> None:
    """The program may have forgotten to give the engine what the run had."""
    here = {section.name for section in state.sections}
    there = {name for name, value in saved.sections.items() if value is not None}
    if anew := sorted((saved.sections.keys() - there) & here):
        logger.info(f"'{folder}' has nothing of {', '.join(anew)}, which begin anew")
    for name in sorted({*there, *(name for one in saved.ranks for name in one)} - here):
        if wanted.takes(name):
            logger.warning(f"'{folder}' has the state of '{name}', which this run does not have: it is not used")


def _say_what_is_not_trained(reader: ValueReader, folder: Path) -> None:
    """A parameter may have been frozen or left out since."""
    if unused := reader.unused_states():
        logger.info(
            f"'{folder}' has optimizer states of {len(unused)} parameters that are not trained here, '{unused[0]}' "
            "say: they are not used"
        )


def _warn_of_weights(reader: ValueReader, rounded: list[str], folder: Path) -> None:
    """What was not loaded, or not as fine as it might be."""
    if left := reader.fit.differences():
        logger.warning(f"'{folder}' and the model differ, and what differs was not loaded: {left}")
    if rounded:
        logger.warning(
            f"'{folder}' has fp32 masters, but none of {len(rounded)} parameters that are fp32 here ('{rounded[0]}', "
            "say): their weights are the 16-bit ones"
        )


def _keepers(state: TrainState) -> list[tuple[str, KeepsValues]]:
    """The sections whose owners have a value per element beside."""
    return [(s.name, s.owner) for s in state.sections if isinstance(s.owner, KeepsValues)]


def _saved_by_ranks(
    section: Section, state: TrainState, saved: SavedState, names: Mapping[str, str]
) -> dict[str, Any] | None:
    """The saved state of a section, for this rank; None: there is none.

    Args:
        names: of parameters here, with what they were called.
    """
    if isinstance(section.owner, DiffersByRank):
        by_rank = [from_plain(one[section.name]) for one in saved.ranks if section.name in one]
        if isinstance(section.owner, KeepsValues):
            by_rank = [_renamed(one, names) for one in by_rank]
        return section.owner.from_ranks(by_rank, state.world.rank, state.world.world_size) if by_rank else None
    return from_plain(saved.sections[section.name]) if section.name in saved.sections else None


def _renamed(state: dict[str, Any], before: Mapping[str, str]) -> dict[str, Any]:
    """A state of several kinds, each by parameter, under the names that the parameters have here.

    Two parameters that were one each have its state.
    """
    moved = {*before, *before.values()}
    renamed = {}
    for kind, values in state.items():
        if isinstance(values, dict):
            others = {key: value for key, value in values.items() if key not in moved}
            values = others | {now: deepcopy(values[name]) for now, name in before.items() if name in values}
        renamed[kind] = values
    return renamed


def _applied_steps(saved: SavedState) -> int:
    """The updates that the run had made."""
    step = from_plain(saved.sections.get("step", {}))
    return int(step.get("loss_scale", {}).get("applied_steps", 0))
