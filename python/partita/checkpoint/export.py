"""The weights of a checkpoint as a file of their own, without an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import Found
from partita.checkpoint.manifest import MANIFEST, parse_manifest
from partita.checkpoint.pieces import MODEL, REMAINDER, Place, of_quantity
from partita.checkpoint.protection import PLAIN, Protection, event_of
from partita.checkpoint.saved_state import STATE, parse_state
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.stored import Stored, read_whole
from partita.device import HOST, kernels
from partita.model import WEIGHT
from partita.model.export import WeightFile


def export(found: Found, path: Path, dtype: torch.dtype | None, protection: Protection = PLAIN) -> Iterator[int]:
    """Writes the model's tensors into one safetensors file, one at a time; gives the bytes of each.

    Tensors that the state dict has under several names are written under each.

    Args:
        dtype: of the floating-point tensors; None: as the model computed. torch.float32 writes the masters of what
            was trained.
        protection: the key of an encrypted checkpoint. What is written is not encrypted.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: `path` is in a folder of a checkpoint.
        OSError: the file cannot be written.
    """
    _require_outside(path)
    cipher = protection.opened(found)
    with Stored(found.path, found.manifest, cipher) as stored:
        names = {place: [place.name] for place in stored.tensors if place.stem == MODEL}
        for alias, name in _aliases(found, cipher).items():
            if Place(MODEL, name) not in names:
                raise CheckpointError(f"'{found.path}' has no tensor '{name}', which {STATE} also calls '{alias}'")
            names[Place(MODEL, name)].append(alias)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for place, its_names in names.items():
            own = stored.dtype(place)
            written = dtype if dtype is not None and own.is_floating_point else own
            layout.update((name, (written, stored.tensors[place].shape)) for name in its_names)
        with WeightFile(path, layout) as file:
            for place, its_names in names.items():
                values = _read(stored, place, dtype)
                for name in its_names:
                    file.write(name, values)
                    yield values.nbytes
    protection.tell(found.path.parent, event_of("exported", found))


def _aliases(found: Found, cipher: Cipher | None) -> dict[str, str]:
    if STATE not in found.manifest.files:
        raise CheckpointError(f"'{found.path}' has no {STATE} in its manifest: it was not written by Partita")
    small = read_whole(found.path, STATE, found.manifest.files[STATE], cipher)
    return parse_state(small, str(found.path / STATE)).aliases


def _require_outside(path: Path) -> None:
    """What is in a checkpoint's folder must stay as it was saved, and goes with the next save of the tag."""
    for folder in Path(os.path.realpath(path)).parents:
        with suppress(CheckpointError, OSError):
            parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
            raise ValueError(f"'{path}' would be in the checkpoint '{folder}': give a path outside of it")


def _read(stored: Stored, place: Place, dtype: torch.dtype | None) -> Tensor:
    master, remainder = (of_quantity(kind, place) for kind in (WEIGHT, REMAINDER))
    if dtype in (torch.float32, torch.float64) and master in stored.tensors:
        return _whole(stored, master)
    values = _whole(stored, place)
    if dtype in (torch.float32, torch.float64) and remainder in stored.tensors:
        joined = torch.empty(values.shape, dtype=torch.float32, device=HOST)
        kernels.join_master(joined, values, _whole(stored, remainder))
        return joined
    return values


def _whole(stored: Stored, place: Place) -> Tensor:
    values = torch.empty(stored.tensors[place].shape, dtype=stored.dtype(place), device=HOST)
    stored.read(place, 0, values.view(-1))
    stored.finish()
    return values
