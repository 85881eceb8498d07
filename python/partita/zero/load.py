"""Weights from files or a state dict, straight into partitioned parameters."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partita.comm import Communicator, SingleProcess, any_rank_each, raise_together, text_by_rank
from partita.device import HOST, FreedMemory
from partita.device.kernels import why_no_memory
from partita.units import Holder, ShardRun, holders_of
from partita.zero.gathered import GatheredParameters

if TYPE_CHECKING:
    from partita.checkpoint.places import Place
    from partita.checkpoint.tensor_files import TensorFiles

logger = logging.getLogger("partita")

WeightSource = Mapping[str, Tensor] | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class PartlyLoadedError(RuntimeError):
    """A file could not be read any more, or had other bytes, after weights had begun to be written: some are those of
    before, and some are not."""


@dataclass(frozen=True)
class _Weights:
    """What a source has. read: gives a whole tensor. files: where it is read from, if it is files."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    files: TensorFiles | None = None


def load_weights(model: nn.Module, source: WeightSource, *, strict: bool = True, rank: int = 0) -> list[str]:
    """Gives a model the weights of a full state dict, in every ZeRO stage; a collective.

    Of files that all ranks see, every rank reads its own part alone, straight to its place; what all ranks have as a
    whole outside of units, buffers say, it reads whole. Else `rank` alone reads the source, and the others take its
    values: a state dict, or files that some rank cannot open or that are others there. Then whole parameters exist for
    one unit at a time.

    Args:
        model: partitioned (by `Init` or an engine) or not.
        source: a state dict (needed on `rank` alone, {} elsewhere), a safetensors file, several, a folder of them, with
            or without an index, or a checkpoint (`save_dir/tag`), whose digests are compared before and again.
        strict: every name of the model is in the source, and the other way round.

    Returns:
        Names of the model that the source does not have.

    Raises:
        ValueError: names are missing or unknown (`strict`), a shape differs, a file is a pickle, which is never opened,
            or it is damaged; on all ranks, before anything is written.
        PartlyLoadedError: a file could not be read any more, or was changed, after that; on all ranks.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors: dict[str, Any] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    names_of = holders_of(tensors)
    communicator = next((holder.communicator for holder in names_of if holder is not None), None)
    if communicator is not None and not 0 <= rank < communicator.world_size:
        raise ValueError(f"rank = {rank}: the group has the ranks 0 to {communicator.world_size - 1}")
    group = communicator or SingleProcess()
    reads = communicator is None or communicator.rank == rank
    with ExitStack() as exits, torch.no_grad():
        error: Exception | None = None
        weights: _Weights | None = None
        try:
            if reads or not isinstance(source, Mapping):
                weights = _open(source, exits)
        except (OSError, ValueError, RuntimeError) as problem:
            error = problem if isinstance(problem, ValueError) else ValueError(str(problem))
        files = None if weights is None else weights.files
        in_parts = _all_see(group, files)
        weights = weights if reads or in_parts else None
        if weights is not None and error is None:
            error = _misfit(tensors, weights.shapes, strict)
        raise_together(group, error if reads else None, "the weights cannot be loaded:")
        # Ranks that do not read have no shapes, so this is the answer of the rank that reads.
        shapes = {} if weights is None else weights.shapes
        is_there = any_rank_each(group, [name in shapes for name in tensors])
        found = {name for name, there in zip(tensors, is_there, strict=True) if there}
        loading = _Loading(tensors, group, rank, weights if reads else None)
        if in_parts and files is not None:
            loading.read_in_parts(names_of, found, files)
        else:
            loading.spread(names_of, found)
    return _missing(tensors, found)


# Who has some parameters, their names, and this rank's parts of them by name; None: they are written as a whole.
Plan = tuple[Holder | None, list[str], list[tuple[str, ShardRun]] | None]


class _Loading:
    """Weights on their way into tensors. weights: on the rank that reads for all."""

    def __init__(self, tensors: dict[str, Any], group: Communicator, rank: int, weights: _Weights | None) -> None:
        self._tensors = tensors
        self._group = group
        self._rank = rank
        self._weights = weights
        self._error: Exception | None = None

    def spread(self, names_of: Mapping[Holder | None, list[str]], found: Collection[str]) -> None:
        """The rank that reads gives every tensor to all."""
        freed = FreedMemory()
        for holder, names in names_of.items():
            freed.add(sum(self._tensors[name].nbytes for name in names))
            there = [name for name in names if name in found]
            if holder is None:
                for name in there:
                    self._spread_plain(name)
            else:
                self._spread_held(there)
        self._end()

    def read_in_parts(
        self, names_of: Mapping[Holder | None, list[str]], found: Collection[str], files: TensorFiles
    ) -> None:
        """Every rank reads what it keeps."""
        plans: list[Plan] = []
        for holder, names in names_of.items():
            there = [name for name in names if name in found]
            plans.append((holder, there, _runs(holder, there, self._tensors)))
        self._try(partial(self._check, files, plans))
        error = None if self._error is None else ValueError(str(self._error))
        raise_together(self._group, error, "the weights cannot be loaded:")
        for holder, there, runs in plans:
            if holder is None:
                self._try(partial(self._read_plain, files, there))
            elif runs is None:
                self._spread_held(there)
            else:
                with holder.writing_shards([self._tensors[name] for name in there]):
                    self._try(partial(_read_runs, files, runs))
        self._end()

    def _check(self, files: TensorFiles, plans: list[Plan]) -> None:
        for holder, names, runs in plans:
            for name, run in runs or []:
                files.check(_place(name), run.first, run.memory.numel())
            if runs is None and (holder is None or self._weights is not None):
                for name in names:
                    files.check(_place(name), 0, self._tensors[name].numel())
        files.finish()

    def _read_plain(self, files: TensorFiles, names: list[str]) -> None:
        for name in names:
            files.read_whole_into(_place(name), self._tensors[name].detach())
        files.finish()

    def _spread_held(self, names: list[str]) -> None:
        with GatheredParameters([self._tensors[name] for name in names], modifier_rank=self._rank):
            for name in names if self._weights is not None else []:
                self._try(partial(self._read, name))

    def _spread_plain(self, name: str) -> None:
        if self._weights is not None:
            self._try(partial(self._read, name))
        if self._group.world_size > 1:
            values = self._tensors[name].detach().clone(memory_format=torch.contiguous_format)
            self._group.broadcast(values, self._rank).wait()
            self._tensors[name].copy_(values)

    def _read(self, name: str) -> None:
        assert self._weights is not None
        self._tensors[name].copy_(self._weights.read(name))

    def _try(self, action: Callable[[], object]) -> None:
        """An error of this rank waits for the end, as the others go on. After one nothing is read."""
        try:
            if self._error is None:
                action()
        except (OSError, RuntimeError) as error:
            self._error = error

    def _end(self) -> None:
        try:
            raise_together(self._group, self._error)
        except Exception as error:
            raise PartlyLoadedError(f"the weights were loaded in part, and the model is a mixture: {error}") from error


def _read_runs(files: TensorFiles, runs: list[tuple[str, ShardRun]]) -> None:
    for name, run in runs:
        files.read_into(_place(name), run.first, run.memory)
    files.finish()


def _runs(holder: Holder | None, names: list[str], tensors: Mapping[str, Any]) -> list[tuple[str, ShardRun]] | None:
    """This rank's parts of these parameters, by name. None: there are none."""
    if holder is None:
        return None
    runs: list[tuple[str, ShardRun]] = []
    for name in names:
        of_name = holder.shard_runs([tensors[name]])
        if of_name is None:
            return None
        runs += [(name, run) for run in of_name]
    return runs


def _all_see(group: Communicator, files: TensorFiles | None) -> bool:
    """Whether all ranks have opened the same files."""
    seen = text_by_rank(group, "" if files is None else files.identity())
    if len(set(seen)) == 1:
        return bool(seen[0])
    if group.rank == 0 and all(seen):
        logger.warning("the files of weights are not the same files on all ranks, so one rank reads for all")
    return False


def _open(source: WeightSource, exits: ExitStack) -> _Weights:
    """What a source has.

    Raises:
        OSError, ValueError, CheckpointError: it cannot be read.
    """
    if isinstance(source, Mapping):
        _require_tensors(source)
        tensors = {name: value for name, value in source.items() if isinstance(value, Tensor)}
        unreadable = next(((name, why) for name, value in tensors.items() if (why := _why_unreadable(value))), None)
        if unreadable is not None:
            raise ValueError(f"'{unreadable[0]}' in the weights {unreadable[1]}: give plain tensors with values")
        return _Weights({name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__)
    from partita.checkpoint.weight_files import open_weights  # with pydantic, which `import partita` leaves out

    files = exits.enter_context(open_weights(source))
    return _Weights({place.name: t.shape for place, t in files.tensors.items()}, partial(_whole, files), files)


def _whole(files: TensorFiles, name: str) -> Tensor:
    shape = files.tensors[_place(name)].shape
    values = torch.empty(shape, dtype=files.dtype(_place(name)), device=HOST)
    files.read(_place(name), 0, values.view(-1))
    files.finish()
    return values


def _place(name: str) -> Place:
    from partita.checkpoint.places import MODEL, Place

    return Place(MODEL, name)


def _why_unreadable(tensor: Tensor) -> str | None:
    """Why the values of a tensor of a state dict cannot be read on one rank alone."""
    if (reason := why_no_memory(tensor)) is not None:
        return reason
    return "has no memory" if tensor.numel() and not tensor.untyped_storage().nbytes() else None


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


def _misfit(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], strict: bool) -> ValueError | None:
    """Says what keeps these weights from being loaded; None: nothing."""
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
        return ValueError(f"the weights do not fit the model: {'; '.join(problems[:5])}{more}")
    return None


def _missing(tensors: dict[str, Tensor], names: Iterable[str]) -> list[str]:
    """Names that get no values, under none of the names that a shared tensor has."""
    found = set(names)
    filled = {id(tensor) for name, tensor in tensors.items() if name in found}
    return [name for name, tensor in tensors.items() if id(tensor) not in filled]
