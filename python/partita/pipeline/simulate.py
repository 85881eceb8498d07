"""How long a step takes under given costs, where ranks are idle, and what each must hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from partita.pipeline.prove import prove
from partita.pipeline.schedule import Action, Links, Made, Schedule, ScheduleError, made_by


@dataclass(frozen=True)
class Costs:
    """What stages and transfers cost. Times in seconds, or any other unit throughout. What is left out costs nothing.

    Attributes:
        forward, backward_input, backward_weight: time of F, I and W, by stage; B takes that of I and W.
        activation_bytes: what a forward keeps for the backward, by stage.
        weight_bytes: the part of it that W needs and that stays after I.
        output_bytes: what a stage gives to each that takes its output; its gradient has as many.
        state_bytes: what a stage holds all the time: parameters, gradients, optimizer states.
        latency: of a transfer.
        bandwidth: bytes per unit of time between two ranks, in each direction; inf: transfers cost their latency only.
        overlap: ranks compute while they send. If not, the sender waits until its tensor has arrived.
        reduce: time of reducing a stage's gradients over data-parallel copies, after its last W; beside computing.
        update: time of the optimizer step of a stage, after the reductions of all ranks (clipping asks for all).
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    activation_bytes: tuple[int, ...] = ()
    weight_bytes: tuple[int, ...] = ()
    output_bytes: tuple[int, ...] = ()
    state_bytes: tuple[int, ...] = ()
    latency: float = 0.0
    bandwidth: float = float("inf")
    overlap: bool = True
    reduce: tuple[float, ...] = ()
    update: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        nothing = (0,) * len(self.forward)
        for name, values in list(vars(self).items()):
            if values == ():
                object.__setattr__(self, name, nothing)

    @classmethod
    def equal(cls, num_stages: int, forward: float = 1, backward_input: float = 1, backward_weight: float = 1) -> Costs:
        """All stages alike, transfers for nothing; an activation has one byte, also until W."""
        ones = (1,) * num_stages
        f, i, w = ((time,) * num_stages for time in (forward, backward_input, backward_weight))
        return cls(f, i, w, activation_bytes=ones, weight_bytes=ones)

    def of(self, action: Action) -> float:
        """The time that an action takes."""
        kind, stage, _ = action
        if kind == "F":
            return self.forward[stage]
        inputs, weights = self.backward_input[stage], self.backward_weight[stage]
        return inputs if kind == "I" else weights if kind == "W" else inputs + weights

    def transfer(self, stage: int) -> float:
        """The time that a stage's output, or the gradient of it, is under way."""
        return self.latency + self.output_bytes[stage] / self.bandwidth

    def require_fit(self, num_stages: int) -> None:
        """Raises ScheduleError if there are costs of another number of stages, or if one is no cost."""
        for name, values in vars(self).items():
            if isinstance(values, tuple):
                if len(values) != num_stages:
                    raise ScheduleError(f"{name} has {len(values)} values, and the schedule {num_stages} stages")
                if any(not value >= 0 for value in values):
                    raise ScheduleError(f"{name} = {values}: costs are numbers from 0 on")
        if not self.latency >= 0 or not self.bandwidth > 0:
            raise ScheduleError(f"latency = {self.latency}, bandwidth = {self.bandwidth}: from 0 on, and over 0")


class Span(NamedTuple):
    """An action with its time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A step under some costs.

    Attributes:
        spans: of each rank, in its order.
        compute_time: until the last action ends.
        time: until the last optimizer step ends.
        idle: of each rank, within compute_time.
        peak_bytes: of each rank.
        critical_path: actions that follow each other without a gap to the end; a shorter one ends the step earlier.
    """

    spans: tuple[tuple[Span, ...], ...]
    compute_time: float
    time: float
    idle: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    critical_path: tuple[Span, ...]

    @property
    def bubble(self) -> float:
        """The part of the ranks' time in which they are idle."""
        return sum(self.idle) / (self.compute_time * len(self.idle)) if self.compute_time else 0.0

    def stage_shares(self) -> dict[int, float]:
        """The part of the critical path that each stage has: the largest is the one to shrink."""
        times: dict[int, float] = {}
        for span in self.critical_path:
            times[span.action.stage] = times.get(span.action.stage, 0.0) + span.end - span.start
        whole = sum(times.values())
        return {stage: time / whole for stage, time in sorted(times.items())} if whole else {}


def simulate(schedule: Schedule, costs: Costs, skips: Iterable[tuple[int, int]] = ()) -> Simulation:
    """A step of a schedule; proves the schedule first.

    Raises:
        ScheduleError: the schedule cannot run, or the costs are of other stages.
    """
    skips = list(skips)
    proof = prove(schedule, skips)
    costs.require_fit(schedule.num_stages)
    clock = _Clock(schedule, costs, Links(schedule.num_stages, skips))
    for rank, action in proof.order:
        clock.run(rank, action)
    spans = tuple(tuple(spans) for spans in clock.spans)
    compute_time = max((of_rank[-1].end for of_rank in spans if of_rank), default=0.0)
    idle = tuple(compute_time - sum(span.end - span.start for span in of_rank) for of_rank in spans)
    time = _after_updates(schedule, costs, clock, compute_time)
    peaks = tuple(_peak_bytes(schedule, costs, rank) for rank in range(schedule.num_ranks))
    return Simulation(spans, compute_time, time, idle, peaks, tuple(clock.critical_path()))


@dataclass
class _Clock:
    """Times of actions, each given after those of all that it takes."""

    schedule: Schedule
    costs: Costs
    links: Links
    spans: list[list[Span]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = range(self.schedule.num_ranks)
        self.spans = [[] for _ in ranks]
        self._free = [0.0 for _ in ranks]
        self._queue_free: dict[tuple[int, int], float] = {}
        self._there: dict[tuple[Made, int], tuple[float, Span]] = {}  # with the rank that has it from then on
        self._because: dict[Action, Span | None] = {}

    def run(self, rank: int, action: Action) -> None:
        """The action begins as soon as its rank is free and what it takes is there."""
        start, because = self._free[rank], self.spans[rank][-1] if self.spans[rank] else None
        for source in self.links.taken_by(action):
            there, span = self._there[source, rank]
            if there > start:
                start, because = there, span
        span = Span(action, start, start + self.costs.of(action))
        self.spans[rank].append(span)
        self._because[action] = because
        self._free[rank] = span.end
        self._give(rank, span)

    def critical_path(self) -> list[Span]:
        """Back from the action that ends last to one that waited for nothing."""
        ends = [spans[-1] for spans in self.spans if spans]
        span: Span | None = max(ends, key=lambda span: span.end, default=None)
        path: list[Span] = []
        while span is not None:
            path.append(span)
            span = self._because[span.action]
        return path[::-1]

    def _give(self, rank: int, span: Span) -> None:
        """Here at once; to other ranks over the queues, and there the gradient of an input has the input's bytes."""
        for made in made_by(span.action):
            self._there[made, rank] = (span.end, span)
        for what, stage, m in made_by(span.action)[-1:]:
            for taker in self.links.takers(what, stage):
                receiver = self.schedule.stage_ranks[taker]
                if receiver == rank:
                    continue
                begin = max(self._free[rank], self._queue_free.get((rank, receiver), 0.0))
                arrival = begin + self.costs.transfer(stage if what == "F" else taker)
                self._queue_free[rank, receiver] = arrival
                self._there[(what, stage, m), receiver] = (arrival, span)
                if not self.costs.overlap:
                    self._free[rank] = arrival


def _after_updates(schedule: Schedule, costs: Costs, clock: _Clock, compute_time: float) -> float:
    """When the optimizer steps have been made: after all reductions, of which a rank makes one after the other."""
    if schedule.is_forward_only:
        return compute_time
    reduced = compute_time
    for rank, spans in enumerate(clock.spans):
        last = {span.action.stage: span.end for span in spans if span.action.kind in "BW"}
        done = 0.0
        for stage in sorted(schedule.stages_of(rank), key=lambda stage: last[stage]):
            done = max(done, last[stage]) + costs.reduce[stage]
        reduced = max(reduced, done)
    updates = [sum(costs.update[stage] for stage in schedule.stages_of(r)) for r in range(schedule.num_ranks)]
    return reduced + max(updates)


def _peak_bytes(schedule: Schedule, costs: Costs, rank: int) -> int:
    """States, activations, what W's wait with, and the gradient that a backward has been given."""
    held = sum(costs.state_bytes[stage] for stage in schedule.stages_of(rank))
    peak = held
    for kind, stage, _ in schedule.actions[rank]:
        activation, kept = costs.activation_bytes[stage], costs.weight_bytes[stage]
        if kind == "F":
            held += 0 if schedule.is_forward_only else activation
            peak = max(peak, held)
        else:
            gradient = costs.output_bytes[stage] if kind != "W" else 0
            peak = max(peak, held + gradient)
            held -= kept if kind == "W" else activation if kind == "B" else activation - kept
    return int(peak)
