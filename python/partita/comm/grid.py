"""The ranks of a job as a grid: pipeline stages by data-parallel copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from partita.comm.calls import Calls
from partita.comm.communicator import Communicator, SingleProcess
from partita.comm.observed import Listener, Observed
from partita.comm.waited import Waited


class Coordinates(NamedTuple):
    """Where a rank stands: its pipeline stage, and its place among the data-parallel copies of that stage."""

    pipe: int
    data: int


@dataclass(frozen=True)
class GridShape:
    """Rank r stands at (r // data, r % data): the ranks of a data group are adjacent, as in DeepSpeed.

    Args:
        pipe: number of pipeline stages.
        data: number of data-parallel copies of each stage.

    Raises:
        ValueError: a number is below 1.
    """

    pipe: int
    data: int

    def __post_init__(self) -> None:
        if self.pipe < 1 or self.data < 1:
            raise ValueError(f"a grid of {self.pipe} pipeline stages x {self.data} data-parallel ranks has no rank")

    @staticmethod
    def of_world(world_size: int, pipe: int) -> GridShape:
        """The shape that gives every rank of a job a place.

        Raises:
            ValueError: the ranks do not divide evenly among the stages.
        """
        if pipe < 1 or world_size % pipe:
            raise ValueError(
                f"{world_size} ranks do not divide evenly among {pipe} pipeline stages: start a multiple of the "
                "number of stages, at least 1"
            )
        return GridShape(pipe, world_size // pipe)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.pipe * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank}: the grid has the ranks 0 to {self.world_size - 1}")
        return Coordinates(*divmod(rank, self.data))

    def rank_at(self, pipe: int, data: int) -> int:
        """The rank that stands there.

        Raises:
            ValueError: there is no such place.
        """
        if not (0 <= pipe < self.pipe and 0 <= data < self.data):
            raise ValueError(f"(pipe {pipe}, data {data}) is not in a grid of {self.pipe} x {self.data}")
        return pipe * self.data + data

    @property
    def data_groups(self) -> list[list[int]]:
        """For each pipeline stage, its ranks in order: they hold the same parameters."""
        return [[self.rank_at(p, d) for d in range(self.data)] for p in range(self.pipe)]

    @property
    def pipe_groups(self) -> list[list[int]]:
        """For each data-parallel copy, its ranks in the order of the stages: together they hold one model."""
        return [[self.rank_at(p, d) for p in range(self.pipe)] for d in range(self.data)]


class Connect(Protocol):
    """`world_communicator` with all arguments but these."""

    def __call__(
        self, *, beside: Communicator | None = ..., parts: Sequence[Sequence[int]] | None = ...
    ) -> Communicator: ...


class ProcessGrid:
    """The communicators of a job, one for each axis. A collective of all ranks of the job, like every method.

    The grid owns its communicators. Users of a communicator choose the axis: gradients are reduced over `data`,
    activations travel along `pipe`, and what concerns the whole model is settled over `world`.

    Args:
        connect: makes a communicator. Called without arguments for the world, afterwards with `beside` another one of
            the grid, and with `parts` for an axis of several stages.
        pipe: number of pipeline stages.

    Attributes:
        world: all ranks.
        data: the ranks of this rank's stage. The same object as `world` if there is one stage.
        pipe: the ranks of this rank's copy of the model, in the order of the stages.
        calls: the engine call that the program is in, as all communicators of the grid know it.
        listeners: are told what the communicators carry, once `observe()` was called.

    Raises:
        ValueError: the ranks do not divide evenly among the stages.
        RuntimeError: as `connect` does.
    """

    world: Communicator
    data: Communicator
    pipe: Communicator

    def __init__(self, connect: Connect, pipe: int = 1) -> None:
        self._connect = connect
        self.calls = Calls()
        self.listeners: list[Listener] = []
        self._mark: Callable[[], Any] | None = None
        # Beside the world, with their ranks there.
        self._axes: list[tuple[Communicator, list[int]]] = []
        with ExitStack() as exits:
            self.world = connect()
            exits.callback(self.world.close)
            self.shape = GridShape.of_world(self.world.world_size, pipe)
            self.coordinates = self.shape.coordinates(self.world.rank)
            if pipe == 1:
                self.data, self.pipe = self.world, SingleProcess(self.world.device)
            else:
                self.data = connect(beside=self.world, parts=self.shape.data_groups)
                exits.callback(self.data.close)
                self.pipe = connect(beside=self.world, parts=self.shape.pipe_groups)
                groups = ((self.data, self.shape.data_groups), (self.pipe, self.shape.pipe_groups))
                self._axes += [(axis, self._ranks_of(parts)) for axis, parts in groups]
            exits.callback(self.pipe.close)
            for communicator in (self.world, self.data, self.pipe):
                communicator.calls = self.calls
            self._exits = exits.pop_all()

    def observe(self, mark: Callable[[], Any]) -> None:
        """From now on the communicators tell `listeners` what they carry. Called before anybody has one of them.

        Args:
            mark: a moment on the device, see `Streams.mark`.
        """
        self._mark = mark
        is_one = self.data is self.world
        self.world = self._observed(self.world, "world")
        self.data = self.world if is_one else self._observed(self.data, "data")
        self.pipe = self._observed(self.pipe, "pipe")

    def beside_data(self) -> Communicator:
        """A second communicator of the ranks of `data`, whose collectives have an order of their own. It ends with the
        grid."""
        data = self.data.inner if isinstance(self.data, Observed) else self.data
        made = self._connect(beside=data, parts=None if self.data is self.world else self.shape.data_groups)
        self._exits.callback(made.close)
        made.calls = self.calls
        self._axes.append((made, self._ranks_of(self.shape.data_groups)))
        return self._observed(made, "beside")

    def check_progress(self) -> None:
        """Called while the host waits for its device; see `Communicator.check_progress`."""
        for communicator in (self.world, *(axis for axis, _ in self._axes)):
            communicator.check_progress()

    def waited(self) -> Waited | None:
        """How long this rank's program has been held up so far, by rank of the world. None: the world's communicator
        does not know."""
        total = self.world.waited()
        if total is not None:
            for communicator, ranks in self._axes:
                if (waited := communicator.waited()) is not None:
                    total += waited.in_group(ranks, self.world.world_size)
        return total

    def _observed(self, communicator: Communicator, axis: str) -> Communicator:
        return communicator if self._mark is None else Observed(communicator, axis, self.listeners, self._mark)

    def _ranks_of(self, groups: list[list[int]]) -> list[int]:
        """Those of the group that this rank is in."""
        return next(ranks for ranks in groups if self.world.rank in ranks)

    def close(self) -> None:
        """Closes every communicator, the last one first; a second call does nothing. Over NCCL this waits for the
        ranks of the host, see `OwnGroups.end`; else it is no collective."""
        self._exits.close()
