"""The end of an engine whose GPU, or whose peers, will never be done: nobody waits for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import inside
import partita
import pytest
from communicators import Wrapped
from late_streams import LateStreams, on_late_streams
from partita._core import CommunicationError
from partita.comm import Handle, SingleProcess
from small_models import config, inputs, seeded
from torch import Tensor


class StuckStreams(LateStreams):
    """A device that, from some moment on, is done with nothing more."""

    is_stuck = False

    def copy_to_host(self, tensor: Tensor) -> Any:
        return _MayNeverArrive(self, super().copy_to_host(tensor))

    def is_reached(self, mark: Any) -> bool:
        return not self.is_stuck and super().is_reached(mark)


class _MayNeverArrive:
    def __init__(self, streams: StuckStreams, copy: Any) -> None:
        self._streams, self._copy = streams, copy

    def wait(self) -> Any:
        assert not self._streams.is_stuck, "the host waits for what never comes"
        return self._copy.wait()

    def come_after(self) -> None:
        self._copy.come_after()


class Failing(Wrapped):
    """Of a rank whose peers are gone from some moment on."""

    are_gone = False

    def start(self, name: str, buffer: Tensor, collective: Callable[[], Handle]) -> Handle:
        if self.are_gone:
            raise CommunicationError(f"{name}: rank 1 is gone")
        return super().start(name, buffer, collective)


@contextmanager
def _engine_after_two_steps(**changes: Any) -> Iterator[tuple[partita.Engine, StuckStreams, Failing]]:
    streams, communicator = StuckStreams(), Failing(SingleProcess())
    with inside.with_connect(lambda *args, **kwargs: communicator), on_late_streams(streams):
        engine = partita.Engine(seeded(), config=config(steps_per_print=1, wall_clock_breakdown=True, **changes))
        for step in range(2):
            engine.backward(engine(inputs(step)))
            engine.step()
        yield engine, streams, communicator


def _reported(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage().split("  ")[0] for r in caplog.records if r.getMessage().startswith("step ")]


@pytest.mark.parametrize("stage", [0, 3])
def test_after_a_failed_collective_nobody_waits(caplog, stage):
    """Not even later, when the program has handled the error."""
    caplog.set_level(logging.INFO, "partita")
    with _engine_after_two_steps(zero_optimization={"stage": stage}) as (engine, streams, communicator):
        streams.is_stuck = communicator.are_gone = True
        with pytest.raises(CommunicationError, match=r"rank 1 is gone"):
            engine.backward(engine(inputs(2)))
        engine.destroy()
    assert _reported(caplog) == ["step 1"]


def test_a_wait_for_the_outcome_that_failed_is_not_begun_again(caplog):
    """What looks around during a wait may end the wait, see `Streams`."""
    caplog.set_level(logging.INFO, "partita")
    with _engine_after_two_steps() as (engine, _, _):
        engine.backward(engine(inputs(2)))
        waits = 0

        def fail() -> None:
            nonlocal waits
            waits += 1
            raise CommunicationError("all_reduce is late")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_MayNeverArrive, "wait", lambda _: fail())
            with pytest.raises(CommunicationError, match=r"all_reduce is late"):
                engine.step()
            engine.destroy()
    assert waits == 1
    assert _reported(caplog) == ["step 1"]


@pytest.mark.parametrize("error", [ValueError, FloatingPointError])
@pytest.mark.parametrize("arrived", [False, True])
def test_an_error_of_this_rank_ends_the_engine_without_a_wait(caplog, error, arrived):
    """The report of the last step comes if it is there."""
    caplog.set_level(logging.INFO, "partita")
    with _engine_after_two_steps() as (engine, streams, _), pytest.raises(error, match=r"of the program"):
        try:
            raise error("of the program")
        finally:
            if arrived:
                streams.catch_up()
            streams.is_stuck = not arrived
            engine.destroy()
    assert _reported(caplog) == (["step 1", "step 2"] if arrived else ["step 1"])


@pytest.mark.parametrize("kind", [None, StopIteration, KeyboardInterrupt])
def test_any_other_end_tells_the_last_step(caplog, kind):
    """As the end of the data is no error."""
    caplog.set_level(logging.INFO, "partita")
    with _engine_after_two_steps() as (engine, _, _):
        if kind is None:
            engine.destroy()
        else:
            try:
                raise kind
            except kind:
                engine.destroy()
    assert _reported(caplog) == ["step 1", "step 2"]
