"""What a pipeline did beside what the simulation says: idle time, activations; and tensors under way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from environment import Ranks
from language.pipeline_layers import mean_loss
from partita.comm import Communicator, TorchCommunicator, communicator_of
from partita.pipeline import Costs, Schedule, Span, simulate
from pipeline_engines import Pipeline
from pipeline_task import PipelineTask
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

WORD = 4  # bytes of an fp32 number


# -- tensors under way


def transport_us(task: PipelineTask, rounds: int, ranks: Ranks) -> dict[str, list[float]]:
    """Microseconds that the output of a stage is under way, by transport: half of there and back, one per round."""
    world = dist.group.WORLD
    assert world is not None
    shared = communicator_of(world, "shared_memory", timedelta(seconds=60))
    tensor = torch.ones(task.size, task.length, task.model.width)
    ways: dict[str, Callable[[], None]] = {
        "shared memory": _there_and_back(shared, tensor, ranks.rank),
        "our gloo": _there_and_back(TorchCommunicator(world), tensor, ranks.rank),
        "gloo": lambda: _there_and_back_of_torch(tensor, ranks.rank),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            ranks.barrier()
            start = time.perf_counter()
            for _ in range(20):
                way()
            times[name].append(ranks.largest((time.perf_counter() - start) / 40 * 1e6))
    shared.close()
    return {name: values[1:] for name, values in times.items()}


def _there_and_back(communicator: Communicator, tensor: Tensor, rank: int) -> Callable[[], None]:
    """As the engine does it: copied into a buffer of the transport, sent from there, received into memory of torch."""
    message = communicator.empty(tensor.numel(), tensor.dtype).view(tensor.shape)
    room = torch.empty_like(tensor)

    def there_and_back() -> None:
        if rank == 1:
            communicator.recv(room, 0).wait()
        message.copy_(tensor)
        sent = communicator.send(message, 1 - rank)
        if rank == 0:
            communicator.recv(room, 1).wait()
        sent.wait()

    return there_and_back


def _there_and_back_of_torch(tensor: Tensor, rank: int) -> None:
    if rank == 0:
        dist.send(tensor, 1)
    dist.recv(tensor, 1 - rank)
    if rank == 1:
        dist.send(tensor, 0)


# -- idle time


@dataclass(frozen=True)
class Transfer:
    """Of a stage's output. `overlaps`: other threads than those that compute carry it; shared memory has none."""

    seconds: float
    overlaps: bool


@dataclass(frozen=True)
class Idle:
    """Parts of the ranks' time, one per step: as it was, and under the median times of that step's actions."""

    measured: list[float]
    simulated: list[float]


def idle_time(pipeline: Pipeline, schedule: Schedule, steps: int, transfer: Transfer, ranks: Ranks) -> Idle:
    """Of steps that are timed action by action."""
    found = Idle([], [])
    for _ in range(steps):
        ranks.barrier()
        pipeline.step()
        of_ranks = _gathered(pipeline.engine.timeline())
        spans = [span for spans in of_ranks for span in spans]
        whole = max(span.end for span in spans) - min(span.start for span in spans)
        busy = sum(span.end - span.start for span in spans)
        found.measured.append(1 - busy / (whole * len(of_ranks)))
        seconds = defaultdict(list)
        for span in spans:
            seconds[span.action.kind, span.action.stage].append(span.end - span.start)
        typical = {of: median(values) for of, values in seconds.items()}
        costs = replace(costs_of(typical, schedule.num_stages), latency=transfer.seconds, overlap=transfer.overlaps)
        found.simulated.append(simulate(schedule, costs).bubble)
    return found


def costs_of(seconds: dict[tuple[Any, int], float], stages: int) -> Costs:
    """From the seconds of actions by kind and stage. Of a joint backward either half has the half."""

    def of(kind: str, stage: int) -> float:
        joint = seconds.get(("B", stage), 0.0) / 2
        return seconds.get((kind, stage), joint)

    numbers = range(stages)
    forward, inputs, weights = (tuple(of(kind, stage) for stage in numbers) for kind in "FIW")
    return Costs(forward, inputs, weights)


def _gathered(spans: Sequence[Span]) -> list[list[Span]]:
    """Of all ranks. Their clock is the host's."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(spans))
    return found


# -- activations


def memory_costs(task: PipelineTask, costs: Costs) -> Costs:
    """With the bytes that each stage keeps for its backward, measured by itself in this process."""
    activations, weights = [], []
    for number, bound in enumerate(task.bounds(len(costs.forward))):
        kept, for_weights = _kept_bytes(task, task.layers(bound), number == 0, number == len(costs.forward) - 1)
        activations.append(kept)
        weights.append(for_weights)
    return replace(costs, activation_bytes=tuple(activations), weight_bytes=tuple(weights))


def _kept_bytes(task: PipelineTask, module: nn.Module, is_first: bool, is_last: bool) -> tuple[int, int]:
    """What is kept from a forward to its backward, the input of the stage too; what weight gradients need of it."""
    for_weights = 0

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal for_weights
        for_weights += (inputs[0].numel() + output.numel()) * WORD

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(note)
    tokens, targets = task.data()[0]
    with _Memory() as memory:
        x = tokens if is_first else torch.zeros(task.size, task.length, task.model.width).requires_grad_()
        output = module(x)
        if is_last:
            output = mean_loss(output, targets)
    del x, output  # not before the end of the measurement
    return memory.changes[-1][1], for_weights


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank. `at_actions`: the most at the end of an action; `peak`: with what actions need in between."""

    at_actions: int
    peak: int
    simulated: int


def activations(pipeline: Pipeline, schedule: Schedule, costs: Costs, ranks: Ranks) -> list[Activations]:
    """Of one step, by rank: what it allocates and has not freed yet."""
    with _Memory() as memory:
        pipeline.step()
    ends = [memory.clock_ns(span.end) for span in pipeline.engine.timeline() if span.action.kind != "W"]
    at_actions = max(memory.held_at(end) for end in ends)
    own = Activations(
        at_actions, max(held for _, held in memory.changes), simulate(schedule, costs).peak_bytes[ranks.rank]
    )
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own)
    return found


class _Memory:
    """Bytes that torch allocates in this process while the block runs, less those it frees.

    Attributes:
        changes: (nanoseconds, bytes held from then on), in their order.
    """

    changes: list[tuple[int, int]]

    def __enter__(self) -> _Memory:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        held, self.changes = 0, [(0, 0)]
        for when, change in changes:
            held += change
            self.changes.append((when, held))

    def clock_ns(self, seconds: float) -> int:
        """The profiler's clock, of `time.perf_counter()`."""
        return int(seconds * 1e9) + self._offset_ns

    def held_at(self, when_ns: int) -> int:
        return next(held for when, held in reversed(self.changes) if when <= when_ns)
