"""Ranks that call different collectives: every rank learns what was called, and by whom."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import partita
import pytest
import torch
import torch.distributed as dist
from partita.comm import CommunicationError, Communicator, world_communicator

CALLS: dict[str, Callable[[Communicator, int], Any]] = {
    "all_reduce (sum) of 12 f32": lambda c, _: c.all_reduce(torch.zeros(12)),
    "all_reduce (average) of 12 f32": lambda c, _: c.all_reduce(torch.zeros(12), partita.comm.Reduction.average),
    "all_reduce (sum) of 6000 f32": lambda c, _: c.all_reduce(torch.zeros(6000)),
    "all_reduce (sum) of 6000 bf16": lambda c, _: c.all_reduce(torch.zeros(6000, dtype=torch.bfloat16)),
    "reduce_scatter (sum) of 12 f32": lambda c, _: c.reduce_scatter(torch.zeros(12)),
    "all_gather of 6000 f32": lambda c, _: c.all_gather(c.empty(6000, torch.float32)),
    "broadcast from rank 0 of 96 bytes": lambda c, _: c.broadcast(torch.zeros(12, dtype=torch.int64), 0),
    "broadcast from rank 1 of 96 bytes": lambda c, _: c.broadcast(torch.zeros(12, dtype=torch.int64), 1),
    "barrier": lambda c, _: c.barrier(),
}
NAMES = list(CALLS)
PAIRS = [(0, 1), (0, 2), (0, 4), (2, 3), (5, 2), (6, 7), (8, 0), (3, 8)]


def _disagree(pairs: list[tuple[str, str]], odd_one: int) -> list[list[str]]:
    """For each pair, the errors of the call, of waiting again, and of the next call."""
    messages = []
    for usual, other in pairs:
        communicator = world_communicator("shared_memory", timedelta(seconds=10))
        found = []
        try:
            handle = CALLS[other if communicator.rank == odd_one else usual](communicator, 0)
            if handle is not None:
                handle.wait()
        except CommunicationError as error:
            found.append(str(error))
        try:
            communicator.barrier()
        except CommunicationError as error:
            found.append(str(error))
        dist.barrier()
        communicator.close()
        messages.append(found)
    return messages


@pytest.mark.parametrize("odd_one", [0, 1])
def test_different_calls_name_both_sides_on_all_ranks(ranks, odd_one):
    """Another collective, size, dtype, reduction or root; the group is of no use afterwards, and says so."""
    pairs = [(NAMES[a], NAMES[b]) for a, b in PAIRS]
    for rank, messages in enumerate(ranks(3).run(_disagree, pairs, odd_one)):
        for (usual, other), (message, later) in zip(pairs, messages, strict=True):
            assert usual in message, (rank, message)
            assert other in message, (rank, message)
            assert f"on rank {odd_one}" in message
            assert "all ranks must call the same collectives in the same order" in message
            assert later == message


def _mismatched_message() -> str:
    communicator = world_communicator("shared_memory", timedelta(seconds=10))
    try:
        if communicator.rank == 0:
            communicator.send(torch.zeros(5), 1).wait()
        else:
            communicator.recv(torch.zeros(6, dtype=torch.bfloat16), 0).wait()
    except CommunicationError as error:
        return str(error)
    finally:
        dist.barrier()
        communicator.close()
    return ""


def test_a_receive_names_what_was_sent_instead(ranks):
    """The receiver is the one to notice."""
    message = ranks(2).run(_mismatched_message)[1]
    for part_of_it in ("receive from rank 0 of 6 bf16", "rank 0 sent 5 f32"):
        assert part_of_it in message
