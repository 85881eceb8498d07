"""Copies between the host and a GPU on streams of their own, and memory that several streams use: on a real device."""

from __future__ import annotations

import pytest
import torch
from on_gpu import CUDA, NEEDS_CUDA
from partita.device import AcrossStreams, Streams, host_buffer, streams_of
from torch import Tensor

pytestmark = NEEDS_CUDA

NUMEL = 1 << 22  # 16 MiB
LATE_CYCLES = 40_000_000  # of the GPU's clock, some 20 ms


@pytest.fixture
def streams() -> Streams:
    return streams_of(CUDA)


def full(value: float) -> Tensor:
    return torch.full((NUMEL,), value, dtype=torch.float32, device=CUDA)


def pinned(value: float) -> Tensor:
    return host_buffer(NUMEL, torch.float32, True).fill_(value)


def test_a_copy_to_the_host_has_what_was_there_and_may_be_overwritten_after_it(streams):
    source, host = full(0.0), pinned(-1.0)
    torch.cuda._sleep(LATE_CYCLES)
    source.fill_(1.0)
    with streams.to_host():
        torch.cuda._sleep(LATE_CYCLES)
    copy = streams.copy_into(host, source)
    copy.come_after()
    source.fill_(2.0)
    assert copy.wait() is host
    assert host.unique().tolist() == [1.0]


def test_a_copy_from_the_host_is_there_for_what_comes_after_it(streams):
    destination, host = full(0.0), pinned(3.0)
    with streams.to_device():
        torch.cuda._sleep(LATE_CYCLES)
        copy = streams.bring(destination, host)
        in_the_block = destination * 2
    copy.come_after()
    after = destination + 1
    copy.wait()
    host.fill_(5.0)
    torch.cuda.synchronize()
    assert in_the_block.unique().tolist() == [6.0]
    assert after.unique().tolist() == [4.0]


@pytest.mark.parametrize("way", ["to_host", "to_device"])
def test_copies_do_not_hold_up_what_computes(streams, way):
    values = full(1.0)
    with getattr(streams, way)():
        torch.cuda._sleep(20 * LATE_CYCLES)
        copied = streams.mark()
    values.add_(1)
    torch.cuda.current_stream().synchronize()
    assert values[0] == 2
    assert not streams.is_reached(copied), "the current stream has waited for the stream of copies"


def test_the_host_looks_around_while_it_waits(streams):
    looks = []
    streams.while_waiting = lambda: looks.append(1)
    torch.cuda._sleep(20 * LATE_CYCLES)
    copy = streams.copy_to_host(torch.ones(3, device=CUDA))
    assert copy.wait().tolist() == [1.0] * 3
    assert looks


def test_memory_goes_after_the_streams_that_used_it(streams):
    """A second stream waits for the arrival, and reads what is there although the memory is given up meanwhile."""
    home, shared, side = full(0.0), AcrossStreams(streams), torch.cuda.Stream()
    main = torch.cuda.current_stream()
    torch.cuda._sleep(LATE_CYCLES)
    home.fill_(7.0)
    shared.is_ready()
    seen = torch.empty(NUMEL, dtype=torch.float32, device=CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(LATE_CYCLES)
    home.fill_(8.0)
    shared.is_ready()
    with torch.cuda.stream(side):
        shared.use()
        torch.cuda._sleep(LATE_CYCLES)
        seen.copy_(home)
    shared.give_up(main)
    home.untyped_storage().resize_(0)
    full(9.0)  # in the same memory
    torch.cuda.synchronize()
    assert seen.unique().tolist() == [8.0]
