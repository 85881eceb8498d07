"""Offloading from a device whose copies take time: what is started when, and waited for when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import inside
import partita
import pytest
import torch
from dictated import Dictated
from late_streams import LateStreams, on_late_streams
from offloaded import (
    assert_same,
    offloading,
    one_backward,
    seen_in,
    three_backwards,
)
from partita.units import Gathered
from torch import Tensor


class OnHost(Tensor):
    """Memory that is not the device's, as its `device` says."""

    device = torch.device("cpu", 0)  # type: ignore[assignment]


class ApartStreams(LateStreams):
    """The host has memory of its own."""

    def copy_to_host(self, tensor: Tensor) -> Any:
        copy = super().copy_to_host(tensor)
        if tensor.is_floating_point():  # gradients
            copy._bytes = copy._bytes.as_subclass(OnHost)
        return copy


def _set_apart(engine: partita.Engine) -> None:
    """From now on, what gradients and shards are copied to and from is on another device."""
    for unit in inside.units(engine):
        if unit.offloads:
            unit.reduced = unit.reduced.as_subclass(OnHost)
            if engine.config.zero_optimization.offload_param.device == "cpu" and isinstance(unit.residence, Gathered):
                unit.residence.own_params = unit.own_params.as_subclass(OnHost)
    inside.streams(engine).waits()


def _late(config: dict[str, Any], backward: Callable[..., None], apart: bool) -> list[tuple[int, int]]:
    """Copies and waits of the late run, whose bits are those of the usual one."""
    expected_rows, expected = seen_in(config, backward)
    with on_late_streams(ApartStreams() if apart else LateStreams()) as streams:
        rows, state = seen_in(config, backward, prepare=_set_apart if apart else None)
    assert repr(rows) == repr(expected_rows)
    assert_same(state, expected)
    return [(streams.copies, len({event for event in streams.events if event[0] == "wait"}))]


@pytest.mark.pairwise
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backward", [one_backward, three_backwards])
@pytest.mark.parametrize("change", ["plain", "accumulation", "fp32 sums", "16-bit traffic", "torch optimizer"])
@pytest.mark.parametrize(
    ("offload", "over"), [("1", "auto"), ("2", "torch"), ("2, some", "auto"), ("3, parameters too", "torch")]
)
def test_gradients_that_arrive_late_are_read_when_they_have_arrived(ranks, offload, over, change, backward, apart):
    """G1, for the way to the host: what is on its way is garbage until somebody waits."""
    ranks(2).run(_late, offloading(offload, "bf16", change, over), backward, apart)


def _order(config: dict[str, Any]) -> list[Any]:
    """For the second step: what happened before step(), and in it until the norm was summed."""
    with on_late_streams(ApartStreams()) as streams:
        engine = partita.Engine(model=Dictated(), config=config)
        _set_apart(engine)
        one_backward(engine, 0, bad=False)
        engine.step()
        first = streams.copies
        streams.events.clear()
        one_backward(engine, 1, bad=False)
        in_backward = [event for event in streams.events if event[0] in ("copy", "wait")]
        streams.events.clear()
        with inside.watching_step(engine, lambda: streams.events.append(("run",))):
            engine.step()
        events = [event for event in streams.events if event[0] in ("copy", "wait", "run")]
        before_run = events[: events.index(("run",))]
        engine.destroy()
    return [first, in_backward, before_run]


@pytest.mark.parametrize("stage", [1, 2])
def test_backward_starts_copies_and_waits_for_none(ranks, stage):
    """Each unit's gradients are under way once, and all of them have arrived when the step begins to compute."""
    for first, in_backward, before_run in ranks(2).run(_order, offloading(str(stage))):
        assert all(number > first for kind, number in in_backward), "waits in backward"
        assert not [event for event in in_backward if event[0] == "wait"]
        copied = {event[1] for event in [*in_backward, *before_run] if event[0] == "copy"}
        waited = {event[1] for event in before_run if event[0] == "wait"}
        assert copied
        assert copied <= waited
