"""Offloading from a device whose copies take time: what is started when, and waited for when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import inside
import partita
import pytest
import torch
from communicators import WaitingCommunicator, communicating_through, world_communicator_by_default
from dictated import Dictated, dictate
from late_streams import LateStreams, TellingCommunicator, on_late_streams
from offloaded import (
    assert_same,
    offloading,
    one_backward,
    seen_in,
    state_of,
    three_backwards,
)
from partita.comm import Communicator
from partita.utils import safe_set_full_fp32_param
from partita.zero import GatheredParameters

# Whether copies to the host read their source as late or as early as may be, and whether collectives wait for whoever
# waits for them.
LATE, LATE_GATHERS, EARLY = (True, False), (True, True), (False, True)


def _trains_as_usual(config: dict[str, Any], backward: Callable[..., None], late: bool, waiting: bool) -> None:
    """The bits of the run whose copies take no time."""
    expected_rows, expected = seen_in(config, backward)
    streams = LateStreams(late=late)

    def through(inner: Communicator) -> Communicator:
        return TellingCommunicator(WaitingCommunicator(inner) if waiting else inner, streams)

    over = inside.with_connect(world_communicator_by_default(config["comm"]["transport"]))
    with on_late_streams(streams), over, communicating_through(through):
        rows, state = seen_in(config, backward)
    assert repr(rows) == repr(expected_rows)
    assert_same(state, expected)
    assert streams.copies > 3 * len(rows)


@pytest.mark.pairwise
@pytest.mark.parametrize(("late", "waiting"), [LATE, LATE_GATHERS, EARLY])
@pytest.mark.parametrize("backward", [one_backward, three_backwards])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "change",
    ["clipping", "fp32 sums", "16-bit traffic", "torch optimizer, accumulation, clipping", "not overlapped"],
)
@pytest.mark.parametrize(
    ("offload", "over"),
    [("1", "auto"), ("2", "torch"), ("2, some", "auto"), ("3", "torch"), ("3, parameters too", "torch")],
)
def test_copies_that_come_late_change_nothing(ranks, offload, over, change, precision, backward, late, waiting):
    """G1, for both ways: what is read too early is garbage, and what is written too early spoils a copy."""
    ranks(2).run(_trains_as_usual, offloading(offload, precision, change, over), backward, late, waiting)


@pytest.mark.parametrize("offload", ["1", "2", "3, parameters too"])
def test_copies_of_one_rank_may_come_late_too(ranks, offload):
    """No collective waits for a copy there."""
    ranks(1).run(_trains_as_usual, offloading(offload, "bf16", "accumulation"), three_backwards, True, False)


def _writes_weights(config: dict[str, Any], how: str) -> None:
    """Values on the host are written right after an update, whose parameters may be on their way to the device."""
    states = []
    for streams in (None, LateStreams()):
        with nullcontext() if streams is None else on_late_streams(streams):
            engine = partita.Engine(model=Dictated(), config=config)
            for step in range(2):
                one_backward(engine, step, bad=False)
                engine.step()
                if how == "loaded":
                    engine.load_module_state_dict(Dictated(seed=5 + step).state_dict())
                elif how == "gathered":
                    with torch.no_grad(), GatheredParameters([engine.module.e], modifier_rank=0):
                        engine.module.e[::7] = 1.5
                else:
                    safe_set_full_fp32_param(engine.module.e, torch.full_like(dictate(step)["e"], 0.5 + step))
            states.append(state_of(engine))
            engine.destroy()
    assert_same(states[1], states[0], how)


@pytest.mark.parametrize("how", ["loaded", "gathered", "masters"])
@pytest.mark.parametrize("offload", ["1", "3, parameters too"])
def test_writes_of_the_host_wait_for_the_copies_that_read_there(ranks, offload, how):
    """O3"""
    ranks(1).run(_writes_weights, offloading(offload, "fp32"), how)


def _order(config: dict[str, Any]) -> list[Any]:
    """For the second step: what happened before step(), and in it until the norm was summed."""
    with on_late_streams(LateStreams()) as streams:
        engine = partita.Engine(model=Dictated(), config=config)
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
