"""The weights of a checkpoint as files of their own, without an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from partita.checkpoint.errors import CheckpointError
from partita.checkpoint.folder import Found
from partita.checkpoint.layout import TensorSpec
from partita.checkpoint.model_files import ModelFiles
from partita.checkpoint.model_weights import Read
from partita.checkpoint.places import MODEL, REMAINDER, Place, dtype_name, of_quantity
from partita.checkpoint.protection import PLAIN, Protection, event_of
from partita.checkpoint.saved_state import STATE, parse_state
from partita.checkpoint.sealing import Cipher
from partita.checkpoint.stored import Stored, read_whole
from partita.device import HOST, kernels
from partita.model import WEIGHT

_RUN = 2**22  # elements that are read at a time


def export(found: Found, path: Path, dtype: torch.dtype | None, protection: Protection = PLAIN) -> Iterator[int]:
    """Writes the model's tensors into files of their own (see `ModelFiles`), some elements at a time; gives the bytes
    of these.

    Tensors that the state dict has under several names are written under each.

    Args:
        dtype: of the floating-point tensors; None: as the model computed. torch.float32 writes the masters of what
            was trained.
        protection: the key of an encrypted checkpoint. What is written is not encrypted.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: `path` is in a folder of a checkpoint, or cannot be that of model files.
        OSError: the files cannot be written.
    """
    try:
        cipher = protection.opened(found)
    except CheckpointError:
        protection.tell(found.path.parent, event_of("refused", found))
        raise
    with Stored(found.path, found.manifest, cipher) as stored:
        names = {place: [place.name] for place in stored.tensors if place.stem == MODEL}
        for alias, name in _aliases(found, cipher).items():
            if Place(MODEL, name) not in names:
                raise CheckpointError(f"'{found.path}' has no tensor '{name}', which {STATE} also calls '{alias}'")
            names[Place(MODEL, name)].append(alias)
        specs: list[TensorSpec] = []
        for place, its_names in names.items():
            own = stored.dtype(place)
            written = dtype if dtype is not None and own.is_floating_point else own
            specs += [TensorSpec(name, dtype_name(written), stored.tensors[place].shape) for name in its_names]
        files = ModelFiles(path, specs)
        try:
            with files.writing(files.create(), heads=True) as writing:
                for place, its_names in names.items():
                    for name in its_names:
                        yield from _copy(stored, place, dtype, partial(writing.put, name))
            files.publish()
        except BaseException:
            files.discard()
            raise
    protection.tell(found.path.parent, event_of("exported", found))


def _aliases(found: Found, cipher: Cipher | None) -> dict[str, str]:
    if STATE not in found.manifest.files:
        raise CheckpointError(f"'{found.path}' has no {STATE} in its manifest: it was not written by Partita")
    small = read_whole(found.path, STATE, found.manifest.files[STATE], cipher)
    return parse_state(small, str(found.path / STATE)).aliases


def _copy(
    stored: Stored, place: Place, dtype: torch.dtype | None, put: Callable[[int, int, Read], None]
) -> Iterator[int]:
    """Puts a tensor, some elements at a time; gives the bytes of each."""
    numel = math.prod(stored.tensors[place].shape)
    for first in range(0, numel, _RUN):
        values = _read(stored, place, first, min(_RUN, numel - first), dtype)
        written = values.to(dtype) if dtype is not None and values.is_floating_point() else values
        put(first, written.numel(), partial(_part, written))
        yield written.nbytes


def _part(values: Tensor, begin: int, end: int) -> Tensor:
    return values[begin:end]


def _read(stored: Stored, place: Place, first: int, numel: int, dtype: torch.dtype | None) -> Tensor:
    master, remainder = (of_quantity(kind, place) for kind in (WEIGHT, REMAINDER))
    if dtype in (torch.float32, torch.float64) and master in stored.tensors:
        return _elements(stored, master, first, numel)
    values = _elements(stored, place, first, numel)
    if dtype in (torch.float32, torch.float64) and remainder in stored.tensors:
        joined = torch.empty(numel, dtype=torch.float32, device=HOST)
        kernels.join_master(joined, values, _elements(stored, remainder, first, numel))
        return joined
    return values


def _elements(stored: Stored, place: Place, first: int, numel: int) -> Tensor:
    values = torch.empty(numel, dtype=stored.dtype(place), device=HOST)
    stored.read(place, first, values)
    stored.finish()
    return values
