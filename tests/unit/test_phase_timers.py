"""Times of phases, which come when a device has them."""

from __future__ import annotations

from late_streams import LateStreams
from partita.monitor import PhaseTimers


def test_no_step_is_missing_from_the_phases():
    """The times of a step come once, whenever the device is done with it."""
    streams = LateStreams()
    timers = PhaseTimers(True, streams)

    def step(*names: str) -> None:
        for name in names:
            with timers.phase(name):
                pass
        timers.end_step()

    step("forward", "backward", "step")
    assert timers.take() == []
    step("forward", "step")
    streams.catch_up()
    step("forward")
    assert [list(phases) for phases in timers.take()] == [["forward", "backward", "step"], ["forward", "step"]]
    assert timers.take() == []
    streams.catch_up()
    assert [list(phases) for phases in timers.take()] == [["forward"]]
