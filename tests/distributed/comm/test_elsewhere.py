"""Tensors that are not in host memory, given to communicators of CPU tensors: refused by name, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_transport import ONE_HOST, TORCH, TWO_HOSTS, WHOLE, communicator_on
from partita.comm import Communicator, Reduction

CALLS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send", "recv")
HOSTS = {"shared memory": ONE_HOST[3], "torch": TORCH[3], "whole": (WHOLE,) * 3, "two hosts": TWO_HOSTS["2+1"]}


def _refusals(hosts: tuple[str, ...]) -> dict[str, str]:
    with communicator_on(hosts) as communicator:
        errors: dict[str, str] = {}
        for name in CALLS:
            try:
                _call(communicator, name, torch.zeros(6, dtype=torch.float32, device="meta"))
            except ValueError as error:
                errors[name] = str(error)
            ones = torch.ones(6)
            communicator.all_reduce(ones).wait()
            assert (ones == communicator.world_size).all(), name
        return errors


def _call(communicator: Communicator, name: str, tensor: torch.Tensor) -> Any:
    peer = (communicator.rank + 1) % communicator.world_size
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: communicator.all_reduce(tensor, Reduction.max),
        "reduce_scatter": lambda: communicator.reduce_scatter(tensor),
        "all_gather": lambda: communicator.all_gather(tensor),
        "broadcast": lambda: communicator.broadcast(tensor, 0),
        "send": lambda: communicator.send(tensor, peer),
        "recv": lambda: communicator.recv(tensor, peer),
    }
    return calls[name]()


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_a_tensor_without_host_memory_is_refused_before_its_address_is_used(ranks, hosts):
    """Which call, which device, and where; the group goes on."""
    for rank, errors in enumerate(ranks(3).run(_refusals, hosts)):
        assert tuple(errors) == CALLS
        for name, message in errors.items():
            assert message.startswith(f"{name}() of a tensor on 'meta', on rank "), message
            assert message.endswith("what it carries is in host memory"), message
            assert f"on rank {rank} of 3 over " in message or hosts is HOSTS["two hosts"], message
