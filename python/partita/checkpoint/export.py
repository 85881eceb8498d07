"""The weights of a checkpoint as a file of their own, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from partita.checkpoint.folder import Found
from partita.checkpoint.pieces import MODEL, Place, of_quantity
from partita.checkpoint.stored import Stored
from partita.device import HOST, kernels
from partita.model import WEIGHT
from partita.model.export import WeightFile


def export(found: Found, path: Path, dtype: torch.dtype | None) -> Iterator[int]:
    """Writes the model's tensors into one safetensors file, one at a time; gives the bytes of each.

    Args:
        dtype: of the floating-point tensors; None: as the model computed. torch.float32 writes the masters of what
            was trained. A parameter whose name in the model is not that in its state dict has no master here.

    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: the file cannot be written.
    """
    with Stored(found.path, found.manifest) as stored:
        places = [place for place in stored.tensors if place.stem == MODEL]
        layout = {}
        for place in places:
            own = stored.dtype(place)
            layout[place.name] = (
                dtype if dtype is not None and own.is_floating_point else own,
                stored.tensors[place].shape,
            )
        with WeightFile(path, layout) as file:
            for place in places:
                values = _read(stored, place, dtype)
                file.write(place.name, values)
                yield values.nbytes


def _read(stored: Stored, place: Place, dtype: torch.dtype | None) -> Tensor:
    master, remainder = (of_quantity(kind, place.name) for kind in (WEIGHT, "remainder"))
    if dtype == torch.float32 and master in stored.tensors:
        return _whole(stored, master)
    values = _whole(stored, place)
    if dtype == torch.float32 and remainder in stored.tensors:
        joined = torch.empty(values.shape, dtype=torch.float32, device=HOST)
        kernels.join_master(joined, values, _whole(stored, remainder))
        return joined
    return values


def _whole(stored: Stored, place: Place) -> Tensor:
    values = torch.empty(stored.tensors[place].shape, dtype=stored.dtype(place), device=HOST)
    stored.read(place, 0, values.view(-1))
    stored.finish()
    return values
