"""A trace of some steps: what each rank did when, as JSON that Perfetto and chrome://tracing open."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from partita.comm import Carried, Communicator, text_by_rank
from partita.model import modules_to_watch, takes_hooks
from partita.monitor.written import write_whole

logger = logging.getLogger("partita")

PROGRAM, COLLECTIVES = "program", "collectives"


@dataclass(frozen=True)
class Span:
    """Something with a beginning and an end, in seconds of `time.perf_counter`.

    track: `PROGRAM`: spans of it lie one in another. `COLLECTIVES`: spans of it may overlap.
    """

    track: str
    kind: str
    name: str
    begin_s: float
    end_s: float
    args: dict[str, Any] = field(default_factory=dict)


class Trace:
    """Records some steps of this rank, and writes those of all ranks. Outside of these steps it does nothing: no hook
    is on a module, nobody listens to the communicators.

    Args:
        steps: the first and the last one.
        path: of the file, on rank 0.
        model: whose modules' forwards are spans.
        listeners: of the grid, see `ProcessGrid.observe`.
    """

    def __init__(
        self, steps: Sequence[int], path: Path | None, model: nn.Module, world: Communicator, listeners: list[Any]
    ) -> None:
        self._first, self._last = steps
        self._path, self._model, self._world, self._listeners = path, model, world, listeners
        self._spans: list[Span] = []
        self._recording: ExitStack | None = None
        self._step_began = 0.0

    def begin(self, steps_so_far: int) -> None:
        """Records from here on, if the next step is one of the trace."""
        if self._recording is not None or not self._first <= steps_so_far + 1 <= self._last:
            return
        self._step_began = time.perf_counter()
        with ExitStack() as stack:
            self._listeners.append(self._listen)
            stack.callback(self._listeners.remove, self._listen)
            for name, module in modules_to_watch(self._model).items():
                if takes_hooks(module):
                    self._follow(name, module, stack)
            self._recording = stack.pop_all()

    def around(self, phase: str) -> AbstractContextManager[object]:
        """Entered around each phase of a step."""
        return nullcontext() if self._recording is None else self._phase(phase)

    def add_actions(self, actions: Iterable[tuple[str, float, float]]) -> None:
        """Actions of a pipeline: names, begins and ends."""
        if self._recording is not None:
            self._spans += [Span(PROGRAM, "action", name, begin, end) for name, begin, end in actions]

    def after_update(self, step: int) -> None:
        """A step was taken. After the last one of the trace this is a collective, and rank 0 writes the file."""
        if self._recording is not None:
            now = time.perf_counter()
            self._spans.append(Span(PROGRAM, "step", f"step {step}", self._step_began, now))
            self._step_began = now
            if step >= self._last:
                self._end()
                self._write([json.loads(_unpacked(each)) for each in text_by_rank(self._world, _packed(self._told()))])
        self.begin(step)

    def close(self) -> None:
        """Of a run that ends too early, rank 0 writes what it has of its own. No collective."""
        if self._recording is None:
            return
        self._end()
        if self._path is not None:
            logger.warning(f"trace: the run ends before step {self._last}: {self._path} has the spans of rank 0 alone")
        self._write([self._told()])

    def _end(self) -> None:
        if self._recording is not None:
            self._recording.close()
        self._recording = None

    def _told(self) -> dict[str, Any]:
        """What this rank tells rank 0. unix_s: of the clock's zero."""
        return {
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "unix_s": time.time() - time.perf_counter(),
            "events": events_of(self._world.rank, self._spans),
        }

    def _write(self, told: list[dict[str, Any]]) -> None:
        self._spans = []
        if self._path is not None and write_whole(self._path, json.dumps(merged(told))):
            logger.info(f"trace: steps {self._first} to {self._last} are in {self._path}: open it in ui.perfetto.dev")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append(Span(PROGRAM, "phase", name, begin, time.perf_counter()))

    def _listen(self, carried: Carried) -> None:
        name = f"{carried.operation} ({carried.axis})"
        waited = carried.done_s - carried.wait_s
        args = {"bytes": carried.nbytes, "waited_ms": waited * 1e3, "call": carried.call}
        self._spans.append(Span(COLLECTIVES, "collective", name, carried.launched_s, carried.done_s, args))
        self._spans.append(Span(PROGRAM, "wait", f"wait for {name}", carried.wait_s, carried.done_s))

    def _follow(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        begun: list[float] = []
        label = f"{name} ({type(module).__name__})" if name else type(module).__name__

        def begin(module: nn.Module, args: Any) -> None:
            begun.append(time.perf_counter())

        def end(module: nn.Module, args: Any, outputs: Any) -> None:
            if begun:  # the trace may begin in the midst of a forward
                self._spans.append(Span(PROGRAM, "module", label, begun.pop(), time.perf_counter()))

        stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        stack.callback(module.register_forward_hook(end, always_call=True).remove)


def events_of(rank: int, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Spans in the trace event format; times are microseconds of the rank's clock. Collectives that overlap are on
    several rows."""
    rows: list[float] = []  # of collectives: when the last one of each row ends
    names = {0: PROGRAM}
    events: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda s: (s.begin_s, -s.end_s)):
        row = 0
        if span.track == COLLECTIVES:
            free = next((i for i, end in enumerate(rows) if end <= span.begin_s), len(rows))
            rows[free : free + 1] = [span.end_s]
            row = free + 1
            names[row] = COLLECTIVES if row == 1 else f"{COLLECTIVES} {row}"
        begin, duration = span.begin_s * 1e6, (span.end_s - span.begin_s) * 1e6
        event = {"ph": "X", "cat": span.kind, "name": span.name, "pid": rank, "tid": row, "ts": begin, "dur": duration}
        events.append(event | {"args": span.args})
    for row, name in names.items():
        events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": name}})
    return events


def merged(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One trace of what ranks told. Ranks of rank 0's host have one clock; those of others are shifted by what the
    hosts' time of day says."""
    first = told[0]
    events: list[dict[str, Any]] = []
    for rank in told:
        shift = 0.0 if rank["host"] == first["host"] else (rank["unix_s"] - first["unix_s"]) * 1e6
        events += [e | {"ts": e["ts"] + shift} if "ts" in e else e for e in rank["events"]]
        name = f"rank {rank['rank']} on {rank['host']}"
        events.append({"ph": "M", "name": "process_name", "pid": rank["rank"], "args": {"name": name}})
        order = {"sort_index": rank["rank"]}
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank["rank"], "args": order})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _packed(value: Any) -> str:
    return base64.b85encode(zlib.compress(json.dumps(value).encode())).decode()


def _unpacked(text: str) -> str:
    return zlib.decompress(base64.b85decode(text)).decode()
