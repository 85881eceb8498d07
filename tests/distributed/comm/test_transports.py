"""Which transport ranks get; training does not depend on it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest import mock

import inside
import partita
import pytest
import torch
import torch.distributed as dist
from partita.comm import (
    Communicator,
    communicator_of,
    world_communicator,
)
from partita.config import ConfigError
from support import base_config, make_model, train

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
TIMEOUT = timedelta(seconds=30)
SHARED: dict[str, Any] = {"comm": {"transport": "shared_memory"}}

# -- the choice


def _chosen(transport: str, hosts: tuple[str, ...] | None = None) -> str:
    """The class of the communicator, or the error."""
    group = dist.group.WORLD
    assert group is not None
    try:
        if hosts is None:
            made = world_communicator(transport, TIMEOUT)
        else:
            made = communicator_of(group, transport, TIMEOUT, host=hosts[dist.get_rank()])
    except RuntimeError as error:
        return str(error)
    made.barrier()
    made.close()
    return type(made).__name__


@pytest.mark.parametrize("asked", ["auto", "torch", "shared_memory"])
def test_one_process_needs_no_transport(ranks, asked):
    """Whatever is asked for."""
    assert ranks(1).run(_chosen, asked) == ["SingleProcess"]


@pytest.mark.parametrize(
    ("asked", "hosts", "chosen"),
    [
        ("auto", None, "SharedMemoryCommunicator"),
        ("shared_memory", None, "SharedMemoryCommunicator"),
        ("torch", None, "TorchCommunicator"),
        ("auto", tuple("aaaa"), "SharedMemoryCommunicator"),
        ("torch", tuple("aabb"), "TorchCommunicator"),
        ("auto", tuple("abcd"), "TorchCommunicator"),
        ("auto", tuple("aabb"), "HierarchicalCommunicator"),
        ("shared_memory", tuple("aabb"), "HierarchicalCommunicator"),
        ("auto", tuple("abbb"), "HierarchicalCommunicator"),
        ("shared_memory", tuple("abcd"), 'comm.transport is "shared_memory", but no two ranks share a host'),
    ],
)
def test_the_transport_follows_from_the_hosts_and_the_config(ranks, asked, hosts, chosen):
    """The same on all ranks, and usable."""
    assert ranks(4).run(_chosen, asked, hosts) == [chosen] * 4


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _without_shared_memory_on(broken: int, transport: str) -> tuple[str, list[str], bool]:
    """The communicator's class or the error; warnings; whether an all-reduce gave the right sum."""
    log = _Log()
    with ExitStack() as stack:
        partita_log = logging.getLogger("partita")
        partita_log.addHandler(log)
        stack.callback(partita_log.removeHandler, log)
        if dist.get_rank() == broken:
            refused = RuntimeError("memfd_create: not permitted")
            stack.enter_context(mock.patch("partita._core.SharedMemoryGroup", side_effect=refused))
        try:
            made = world_communicator(transport, timedelta(seconds=1))
        except RuntimeError as error:
            return str(error), log.lines, True
    ones = torch.ones(5)
    made.all_reduce(ones).wait()
    return type(made).__name__, log.lines, bool((ones == made.world_size).all())


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_when_one_rank_cannot_join_all_use_torch(ranks, broken):
    """The rank with the trouble says what it is; the others, who they missed."""
    for rank, (chosen, (warning,), works) in enumerate(ranks(3).run(_without_shared_memory_on, broken, "auto")):
        assert chosen == "TorchCommunicator"
        assert works
        assert warning.endswith("; going on over torch.distributed")
        assert ("memfd_create: not permitted" if rank == broken else "did not join") in warning


def test_when_one_rank_cannot_join_all_raise_if_that_was_asked_for(ranks):
    """Nobody is left waiting."""
    for rank, (message, _, _) in enumerate(ranks(3).run(_without_shared_memory_on, 1, "shared_memory")):
        assert message.startswith('comm.transport is "shared_memory", but ')
        assert ("memfd_create: not permitted" if rank == 1 else "did not join") in message


def _asked_of_world_communicator(comm: dict[str, Any]) -> tuple[str, timedelta, str]:
    real, calls = inside.connect(), []

    def record(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    with inside.with_connect(record):
        engine = partita.Engine(make_model(), config=base_config(comm=comm))
    kind = type(inside.communicator(engine)).__name__
    engine.destroy()
    ((transport, timeout, _device),) = calls
    return transport, timeout, kind


@pytest.mark.parametrize(
    ("comm", "expected"),
    [
        ({}, ("auto", timedelta(minutes=10), None)),
        ({"transport": "torch", "timeout_seconds": 7.5}, ("torch", timedelta(seconds=7.5), "TorchCommunicator")),
        (
            {"transport": "shared_memory", "timeout_seconds": 90},
            ("shared_memory", timedelta(seconds=90), "SharedMemoryCommunicator"),
        ),
    ],
)
def test_the_config_reaches_the_transport(ranks, transport, comm, expected):
    """With the default transport, what the tests run on."""
    default = {"auto": "SharedMemoryCommunicator", "torch": "TorchCommunicator"}[transport]
    for asked, timeout, kind in ranks(2).run(_asked_of_world_communicator, comm):
        assert (asked, timeout) == expected[:2]
        assert kind == expected[2] or (expected[2] is None and kind == default)


@pytest.mark.parametrize(
    ("key", "value"),
    [("transport", "tcp"), ("transport", None), ("timeout_seconds", 0), ("timeout_seconds", -1), ("timout", 3)],
)
def test_wrong_values_are_config_errors_that_name_the_key(key, value):
    """Before anything is communicated."""
    called = mock.Mock()
    with inside.with_connect(called), pytest.raises(ConfigError) as raised:
        partita.Engine(make_model(), config=base_config(comm={key: value}))
    assert f"comm.{key}" in str(raised.value)
    assert not called.called


# -- training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_transports_train_alike(ranks, stage, precision):
    """On three ranks, where the orders of summation differ."""
    shared, torchs = (
        ranks(3).run(train, base_config(stage=stage, comm={"transport": name}, **PRECISIONS[precision]))
        for name in ("shared_memory", "torch")
    )
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for run, other in zip(shared, torchs, strict=True):
        torch.testing.assert_close(run[0], other[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(run[2], other[2], rtol=10 * tolerance, atol=tolerance)
        for name, value in run[1].items():
            torch.testing.assert_close(value, other[1][name], rtol=tolerance, atol=tolerance)


def _trained_on_hosts(stage: int, hosts: tuple[str, ...]) -> Any:
    group = dist.group.WORLD
    assert group is not None

    def connect(*_: Any, beside: Communicator | None = None, parts: Any = None) -> Communicator:
        return communicator_of(dist.new_group() if beside else group, "auto", TIMEOUT, host=hosts[dist.get_rank()])

    with inside.with_connect(connect):
        return train(base_config(stage=stage, gradient_clipping=0.5))


@pytest.mark.parametrize("hosts", [tuple("aabb"), tuple("abab"), tuple("aaab")])
@pytest.mark.parametrize("stage", STAGES)
def test_several_hosts_train_as_one(ranks, stage, hosts):
    """All ranks end with the same weights."""
    one = ranks(4).run(train, base_config(stage=stage, gradient_clipping=0.5))
    several = ranks(4).run(_trained_on_hosts, stage, hosts)
    for run, other in zip(several, one, strict=True):
        torch.testing.assert_close(run[0], other[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run[2], other[2], rtol=1e-4, atol=1e-4)
        for name, value in run[1].items():
            assert torch.equal(value, several[0][1][name]), name
            torch.testing.assert_close(value, other[1][name], rtol=1e-3, atol=1e-4)
