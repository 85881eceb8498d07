"""Weights from files or a state dict, straight into partitioned parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.comm import SingleProcess, any_rank_each, raise_together
from partita.device.memory import FreedMemory
from partita.units import holders_of
from partita.zero.gathered import GatheredParameters

WeightSource = Mapping[str, Tensor] | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def load_weights(model: nn.Module, source: WeightSource, *, strict: bool = True, rank: int = 0) -> list[str]:
    """Gives a model the weights of a full state dict, in every ZeRO stage; a collective.

    Whole parameters exist for one unit at a time. Only `rank` reads the source; the others take its values.

    Args:
        model: partitioned (by `Init` or an engine) or not.
        source: a state dict (needed on `rank` alone, {} elsewhere), a safetensors file, several, or a folder of them.
        strict: every name of the model is in the source, and the other way round.

    Returns:
        Names of the model that the source does not have.

    Raises:
        ValueError: names are missing or unknown (`strict`), or a shape differs; on all ranks, before anything is
            written.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors: dict[str, Any] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    names_of = holders_of(tensors)
    plain = names_of.pop(None, [])
    communicator = next((holder.communicator for holder in names_of if holder is not None), None)
    if communicator is not None and not 0 <= rank < communicator.world_size:
        raise ValueError(f"rank = {rank}: the group has the ranks 0 to {communicator.world_size - 1}")
    reads = communicator is None or communicator.rank == rank
    with ExitStack() as files, torch.no_grad():
        error, read = None, None
        shapes: dict[str, tuple[int, ...]] = {}
        if reads:
            try:
                shapes, read = _open(source, files)
                _require_fit(tensors, shapes, strict)
            except (OSError, ValueError) as problem:
                error = problem if isinstance(problem, ValueError) else ValueError(str(problem))
        group = communicator or SingleProcess()
        raise_together(group, error, "the weights cannot be loaded:")
        # Ranks that do not read have no shapes, so this is the answer of the rank that reads.
        is_there = any_rank_each(group, [name in shapes for name in tensors])
        found = {name for name, there in zip(tensors, is_there, strict=True) if there}
        missing = _missing(tensors, found)
        freed = FreedMemory()
        for names in names_of.values():
            freed.add(sum(tensors[name].nbytes for name in names))
            there = [name for name in names if name in found]
            with GatheredParameters([tensors[name] for name in there], modifier_rank=rank):
                if read is not None:
                    for name in there:
                        tensors[name].copy_(read(name))
        for name in (name for name in plain if name in found):
            values = tensors[name].detach().contiguous() if read is None else read(name).to(tensors[name])
            if communicator is not None:
                values = values.clone()
                communicator.broadcast(values, rank).wait()
            tensors[name].copy_(values)
    return missing


def _open(source: WeightSource, files: ExitStack) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by name, and how a tensor is read."""
    if isinstance(source, Mapping):
        tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
        return {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__
    from safetensors import safe_open

    paths = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"there is no *.safetensors file in '{folder}'")
    file_of: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(str(path), framework="pt"))
        except Exception as error:  # safetensors' own types, and those of the system
            raise ValueError(f"'{path}' cannot be read as safetensors: {error}") from error
        for name in file.keys():  # noqa: SIM118 (no mapping)
            file_of[name] = file
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes, lambda name: file_of[name].get_tensor(name)


def _require_fit(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], strict: bool) -> None:
    """Raises a ValueError that says what keeps these weights from being loaded."""
    problems = []
    if strict:
        problems += [f"'{name}' is missing" for name in _missing(tensors, shapes)]
        problems += [f"'{name}' is not in the model" for name in shapes if name not in tensors]
    problems += [
        f"'{name}' has shape {shapes[name]}, in the model {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:5])}{more}")


def _missing(tensors: dict[str, Tensor], names: Iterable[str]) -> list[str]:
    """Names that get no values, under none of the names that a shared tensor has."""
    found = set(names)
    filled = {id(tensor) for name, tensor in tensors.items() if name in found}
    return [name for name, tensor in tensors.items() if id(tensor) not in filled]
