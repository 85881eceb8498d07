"""units/arrivals.py: sums that are added on the host pass through a few buffers there, in the order of their coming."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from late_streams import LateStreams
from partita.comm import SingleProcess
from partita.units.arrivals import LANDINGS, Arrivals
from partita.units.staging import Staging

UNITS, NUMEL = 7, 40


def _units(offloads: bool) -> list[Any]:
    return [
        SimpleNamespace(own=range(NUMEL - i), offloads=offloads, pins=False, reduced=torch.zeros(NUMEL - i))
        for i in range(UNITS)
    ]


def test_sums_that_are_added_on_the_host_pass_through_a_few_buffers():
    """The buffers on the device are written again as soon as a copy may have read them: two for seven units."""
    streams, units = LateStreams(), _units(offloads=True)
    arrivals, staging = Arrivals(streams, units), Staging(SingleProcess(), NUMEL)
    for backward in range(3):
        for i, unit in enumerate(units):
            buffer = staging.take(torch.float32)
            assert buffer is not None
            part = buffer[: len(unit.own)].fill_(10.0**backward * (i + 1))
            staging.give_back(buffer, arrivals.take(unit, part, accumulate=backward > 0))
            assert buffer[0] == 10.0**backward * (i + 1)
    assert arrivals.landing_bytes == LANDINGS * NUMEL * 4
    arrivals.wait()
    for i, unit in enumerate(units):
        assert unit.reduced.tolist() == [111.0 * (i + 1)] * len(unit.own)
    assert arrivals.landing_bytes == LANDINGS * NUMEL * 4


def test_sums_of_another_dtype_are_converted_on_the_host():
    streams, units = LateStreams(), _units(offloads=True)
    arrivals = Arrivals(streams, units)
    arrivals.take(units[0], torch.full((NUMEL,), 1.5, dtype=torch.bfloat16), accumulate=False)
    arrivals.take(units[1], torch.full((NUMEL - 1,), 2.5), accumulate=False)
    assert arrivals.landing_bytes == NUMEL * 2, "what needs no conversion goes straight to its place"
    arrivals.wait()
    assert units[0].reduced.unique().tolist() == [1.5]
    assert units[1].reduced.unique().tolist() == [2.5]


def test_sums_of_units_on_the_device_stay_there():
    streams, units = LateStreams(), _units(offloads=False)
    arrivals = Arrivals(streams, units)
    assert arrivals.take(units[0], torch.ones(NUMEL), accumulate=False) is None
    assert arrivals.take(units[0], torch.ones(NUMEL), accumulate=True) is None
    assert units[0].reduced.unique().tolist() == [2.0]
    assert not streams.copies
