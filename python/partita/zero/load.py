"""Weights from files or a state dict, straight into partitioned parameters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partita.comm import Communicator, ProcessGrid, SingleProcess, raise_together, text_by_rank
from partita.device import FreedMemory
from partita.units import Holder, ShardRun, holders_of
from partita.zero.gathered import GatheredParameters
from partita.zero.names import ModelNames, names_of_all
from partita.zero.sources import Weights, WeightSource, open_source, place_of, weights_of

if TYPE_CHECKING:
    from partita.checkpoint.places import Place
    from partita.checkpoint.tensor_files import TensorFiles

logger = logging.getLogger("partita")


class PartlyLoadedError(RuntimeError):
    """A file could not be read any more, or had other bytes, after weights had begun to be written: some are those of
    before, and some are not."""


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
    return load_on_ranks(model, source, strict=strict, rank=rank).missing


@dataclass(frozen=True)
class OnRanks:
    """A model in training. Each rank of a pipeline has some of its layers.

    replicas: tensors of this rank that belong to another part of the model: name here -> name there.
    """

    grid: ProcessGrid
    replicas: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """missing: names of the model that the source does not have. names: all of a state dict of the whole model."""

    missing: list[str]
    names: set[str]


def load_on_ranks(
    model: nn.Module, source: WeightSource, *, strict: bool, rank: int, on: OnRanks | None = None
) -> Loaded:
    """As `load_weights`, for a model of which this rank may have some layers alone: a source has the whole model.

    Args:
        rank: of `on.grid.world`, where that is given.
        on: None: all ranks of the group in which parameters are partitioned have the whole model.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors: dict[str, Any] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    names_of = holders_of(tensors)
    ranks = _Ranks.of(names_of, rank, on)
    with ExitStack() as exits, torch.no_grad():
        names = names_of_all(ranks.pipe, tensors, {} if on is None else on.replicas)
        error: Exception | None = None
        weights: Weights | None = None
        told: Mapping[str, Any] = {}
        try:
            if ranks.reads or not isinstance(source, Mapping):
                weights = open_source(source, exits)
            if ranks.reads and weights is not None:
                told = _told(weights, names, strict)
        except (OSError, ValueError, RuntimeError) as problem:
            error = problem if isinstance(problem, ValueError) else ValueError(str(problem))
        files = None if weights is None else weights.files
        in_parts = _all_see(ranks.world, files)
        raise_together(ranks.world, error if ranks.reads else None, "the weights cannot be loaded:")
        told = json.loads(text_by_rank(ranks.world, json.dumps(told))[ranks.reader])
        if not in_parts:
            wanted = {told["sources"][name] for name in tensors if name in told["sources"]}
            weights = ranks.along_pipe(weights if ranks.reads else None, wanted, told["forms"])
        loading = _Loading(tensors, told["sources"], ranks, weights)
        if in_parts and files is not None:
            loading.read_in_parts(names_of, files)
        else:
            loading.spread(names_of)
    return Loaded([name for name in names.shapes if name not in told["sources"]], {*names.shapes, *state})


def _told(weights: Weights, names: ModelNames, strict: bool) -> dict[str, Any]:
    """What the rank that reads tells the others, as JSON has it: for each name that gets values the name in the source,
    and shape and dtype of what has this name.

    Raises:
        ValueError, CheckpointError: the weights do not fit, or have a dtype that is not read.
    """
    error = names.misfit(weights.shapes, strict)
    if error is not None:
        raise error
    sources = names.sources(weights.shapes.keys())
    forms = {name: (weights.shapes[name], str(weights.dtype(name)).removeprefix("torch.")) for name in sources.values()}
    return {"sources": sources, "forms": forms}


@dataclass(frozen=True)
class _Ranks:
    """Who loads together.

    world: all ranks. data: those that have the same layers. pipe: those that have the whole model together. reader: of
    world, that reads for all; first, of_data: its rank in its `pipe`, and in its `data`.
    """

    world: Communicator
    data: Communicator
    pipe: Communicator
    reader: int
    first: int
    of_data: int

    @staticmethod
    def of(names_of: Iterable[Holder | None], rank: int, on: OnRanks | None) -> _Ranks:
        """The ranks of a model in training, or of the group in which parameters are partitioned; else this process."""
        group = next((holder.communicator for holder in names_of if holder is not None), None)
        world = on.grid.world if on is not None else group
        if world is not None and not 0 <= rank < world.world_size:
            raise ValueError(f"rank = {rank}: the group has the ranks 0 to {world.world_size - 1}")
        if on is None:
            alone = SingleProcess()
            return _Ranks(group or alone, group or alone, alone, *((0, 0, 0) if group is None else (rank, 0, rank)))
        place = on.grid.shape.coordinates(rank)
        return _Ranks(on.grid.world, on.grid.data, on.grid.pipe, rank, place.pipe, place.data)

    @property
    def reads(self) -> bool:
        """Whether this rank reads for all."""
        return self.world.rank == self.reader

    @property
    def reads_for_data(self) -> bool:
        """Whether this rank has the weights for those with the same layers."""
        return self.data.rank == self.of_data

    def along_pipe(self, weights: Weights | None, wanted: Collection[str], forms: Mapping[str, Any]) -> Weights | None:
        """What the rank that reads gives to the ranks of its pipeline, one tensor after the other; each keeps those of
        its layers. A collective.

        Args:
            wanted: names in the source that this rank keeps.
            forms: shape and dtype of all tensors that travel.

        Raises:
            ValueError: a tensor cannot be read; on all ranks.
        """
        if self.pipe.world_size == 1:
            return weights
        error: Exception | None = None
        kept: dict[str, Tensor] = {}
        for name, (shape, dtype) in forms.items() if self.reads_for_data else ():
            values = torch.empty(shape, dtype=getattr(torch, dtype), device=self.pipe.device)
            try:
                if weights is not None and error is None:
                    values.copy_(weights.read(name))
            except (OSError, RuntimeError) as problem:
                error = ValueError(str(problem))
            self.pipe.broadcast(values, self.first).wait()
            if name in wanted:
                kept[name] = values
        raise_together(self.world, error, "the weights cannot be loaded:")
        return weights_of(kept) if self.reads_for_data else None


# Who has some parameters, their names, and this rank's parts of them by name; None: they are written as a whole.
Plan = tuple[Holder | None, list[str], list[tuple[str, ShardRun]] | None]


class _Loading:
    """Weights on their way into tensors.

    sources: for the names that get values, the name in the source. weights: on the rank that reads for those with the
    same layers.
    """

    def __init__(
        self, tensors: dict[str, Any], sources: Mapping[str, str], ranks: _Ranks, weights: Weights | None
    ) -> None:
        self._tensors = tensors
        self._sources = sources
        self._world, self._group = ranks.world, ranks.data
        self._rank = ranks.of_data
        self._weights = weights if ranks.reads_for_data else None
        self._error: Exception | None = None

    def spread(self, names_of: Mapping[Holder | None, list[str]]) -> None:
        """The rank that reads gives every tensor to all."""
        freed = FreedMemory()
        for holder, names in names_of.items():
            for tensor in (self._tensors[name] for name in names):
                freed.add(tensor.nbytes, tensor.device)
            there = self._there(names)
            if holder is None:
                for name in there:
                    self._spread_plain(name)
            else:
                self._spread_held(there)
        self._end()

    def read_in_parts(self, names_of: Mapping[Holder | None, list[str]], files: TensorFiles) -> None:
        """Every rank reads what it keeps."""
        plans: list[Plan] = []
        for holder, names in names_of.items():
            there = self._there(names)
            plans.append((holder, there, _runs(holder, there, self._tensors)))
        self._try(partial(self._check, files, plans))
        error = None if self._error is None else ValueError(str(self._error))
        raise_together(self._world, error, "the weights cannot be loaded:")
        for holder, there, runs in plans:
            if holder is None:
                self._try(partial(self._read_plain, files, there))
            elif runs is None:
                self._spread_held(there)
            else:
                with holder.writing_shards([self._tensors[name] for name in there]):
                    self._try(partial(self._read_runs, files, runs))
        self._end()

    def _check(self, files: TensorFiles, plans: list[Plan]) -> None:
        for holder, names, runs in plans:
            for name, run in runs or []:
                files.check(self._at(name), run.first, run.memory.numel())
            if runs is None and (holder is None or self._weights is not None):
                for name in names:
                    files.check(self._at(name), 0, self._tensors[name].numel())
        files.finish()

    def _read_plain(self, files: TensorFiles, names: list[str]) -> None:
        for name in names:
            files.read_whole_into(self._at(name), self._tensors[name].detach())
        files.finish()

    def _read_runs(self, files: TensorFiles, runs: list[tuple[str, ShardRun]]) -> None:
        for name, run in runs:
            files.read_into(self._at(name), run.first, run.memory)
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
        self._tensors[name].copy_(self._weights.read(self._sources[name]))

    def _there(self, names: Iterable[str]) -> list[str]:
        """Those that get values, each tensor once."""
        there = {id(self._tensors[name]): name for name in names if name in self._sources}
        return list(there.values())

    def _at(self, name: str) -> Place:
        return place_of(self._sources[name])

    def _try(self, action: Callable[[], object]) -> None:
        """An error of this rank waits for the end, as the others go on. After one nothing is read."""
        try:
            if self._error is None:
                action()
        except (OSError, RuntimeError) as error:
            self._error = error

    def _end(self) -> None:
        try:
            raise_together(self._world, self._error)
        except Exception as error:
            raise PartlyLoadedError(f"the weights were loaded in part, and the model is a mixture: {error}") from error


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
