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
from partita.device.kernels import why_no_memory
from partita.device.memory import FreedMemory
from partita.units import holders_of
from partita.zero.gathered import GatheredParameters

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

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
        ValueError: names are missing or unknown (`strict`), a shape differs, or a file is a pickle, which is never
            opened; on all ranks, before anything is written.
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
        _require_tensors(source)
        tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
        unreadable = next(((name, why) for name, value in tensors.items() if (why := _why_unreadable(value))), None)
        if unreadable is not None:
            raise ValueError(f"'{unreadable[0]}' in the weights {unreadable[1]}: give plain tensors with values")
        return {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__
    from safetensors import safe_open

    paths = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
            why = f"; {_why_no_pickle(pickles[0])}" if pickles else ""
            raise ValueError(f"there is no *.safetensors file in '{folder}'{why}")
    file_of: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        if _is_pickle(path):
            raise ValueError(_why_no_pickle(path))
        try:
            file = files.enter_context(safe_open(str(path), framework="pt"))
        except Exception as error:  # safetensors' own types, and those of the system
            raise ValueError(f"'{path}' cannot be read as safetensors: {error}") from None
        for name in file.keys():  # noqa: SIM118 (no mapping)
            file_of[name] = file
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes, lambda name: file_of[name].get_tensor(name)


def _why_unreadable(tensor: Tensor) -> str | None:
    """Why the values of a tensor of a state dict cannot be read on one rank alone."""
    if (reason := why_no_memory(tensor)) is not None:
        return reason
    return "has no memory" if tensor.numel() and not tensor.untyped_storage().nbytes() else None


def _is_pickle(path: Path) -> bool:
    """Whether this is what torch.save() writes (a zip archive; a pickle before torch 1.6), whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
    except OSError:
        return False  # its reader says what is wrong


def _why_no_pickle(path: Path) -> str:
    return (
        f"'{path}' is a pickle, as torch.save() writes it, and is not opened here: a pickle can run any program. Give "
        f"what torch.load('{path}', map_location='cpu', weights_only=True) returns, or a safetensors file"
    )


def _require_tensors(source: Mapping[str, Any]) -> None:
    """Raises ValueError if the state dict is one of several things in a checkpoint; says where it may be."""
    if any(isinstance(value, Tensor) for value in source.values()):
        return
    nested = [name for name, value in source.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            "there is no tensor in this state dict, it is a checkpoint of several things: give the state dict in it, "
            f"which is under one of {', '.join(repr(name) for name in nested)}"
        )


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
