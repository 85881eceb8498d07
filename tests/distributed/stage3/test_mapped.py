"""Buffers that all ranks of a host see as one, and transports that have none."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from every_transport import ONE_HOST, TORCH, TWO_HOSTS, communicator_on
from partita.comm import CommunicationError, Communicator, SingleProcess
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)
MEBIBYTE = 1 << 20

no_shared_memory = pytest.mark.parametrize("hosts", [TORCH[2], TWO_HOSTS["2+1"]], ids=["torch", "two hosts"])


def _mapped(communicator: Communicator, multiples: int, dtype: torch.dtype) -> Tensor:
    numel = communicator.world_size * multiples * communicator.mapped_multiple(dtype)
    buffer = communicator.mapped(numel, dtype)
    assert buffer is not None
    assert (buffer.numel(), buffer.dtype) == (numel, dtype)
    return buffer


def _writes(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        n, rank = communicator.world_size, communicator.rank
        assert communicator.shares_memory
        for dtype in DTYPES:
            buffer = _mapped(communicator, 3, dtype)
            other = _mapped(communicator, 1, dtype).zero_()
            for writer in range(n):
                if rank == writer:
                    for owner, piece in enumerate(communicator.slices(buffer)):
                        piece.fill_(10 * writer + owner + 1)
                communicator.barrier()
                for owner, piece in enumerate(communicator.slices(buffer)):
                    assert (piece == 10 * writer + owner + 1).all(), (dtype, rank, writer, owner)
                communicator.barrier()
            assert (other == 0).all()


@pytest.mark.parametrize("world_size", ONE_HOST)
def test_what_any_rank_writes_is_there_for_all(ranks, world_size):
    """In every slice, and in no other buffer."""
    ranks(world_size).run(_writes, ONE_HOST[world_size])


def _committed(hosts: tuple[str, ...]) -> int:
    with communicator_on(hosts) as communicator:
        before = communicator.committed_bytes
        buffer = _mapped(communicator, 100, torch.float32)
        if communicator.rank == 0:
            buffer.fill_(1)
        communicator.barrier()
        return communicator.committed_bytes - before - buffer.nbytes // communicator.world_size


@pytest.mark.parametrize("world_size", ONE_HOST)
def test_every_rank_pays_for_its_slice(ranks, world_size):
    """Also when another rank touches it first."""
    assert ranks(world_size).run(_committed, ONE_HOST[world_size]) == [0] * world_size


def _absent(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        assert not communicator.shares_memory
        assert communicator.mapped(1 << 16, torch.float32) is None


@no_shared_memory
def test_other_transports_have_none(ranks, hosts):
    """The hierarchical one, too: its ranks are on several hosts."""
    ranks(len(hosts)).run(_absent, hosts)


def test_a_single_process_has_none():
    """It has nobody to share with."""
    assert SingleProcess().mapped(1 << 16, torch.float32) is None
    assert SingleProcess().mapped_multiple(torch.float32) == 1


def _odd_sizes(hosts: tuple[str, ...]) -> tuple[int, list[str]]:
    with communicator_on(hosts) as communicator:
        multiple = communicator.mapped_multiple(torch.bfloat16)
        errors = []
        for numel in (1, multiple, 2 * multiple + 2, -1):
            with pytest.raises(ValueError) as caught:
                communicator.mapped(numel, torch.bfloat16)
            errors.append(str(caught.value))
        empty = communicator.mapped(0, torch.bfloat16)
        assert empty is not None
        assert (empty.numel(), empty.dtype) == (0, torch.bfloat16)
        _mapped(communicator, 1, torch.bfloat16)  # nobody is out of step
        return multiple, errors


def test_slices_are_whole_pages(ranks):
    """What was asked for, and what would be right."""
    page = os.sysconf("SC_PAGE_SIZE")
    for multiple, errors in ranks(2).run(_odd_sizes, ONE_HOST[2]):
        assert multiple == page // 2
        for numel, error in zip((1, multiple, 2 * multiple + 2, -1), errors, strict=True):
            assert f"{numel} elements" in error
            assert "2 ranks" in error
            assert f"multiple of {multiple} elements" in error


def _different_sizes(hosts: tuple[str, ...]) -> str:
    with pytest.raises(CommunicationError) as caught, communicator_on(hosts) as communicator:
        _mapped(communicator, 1 + communicator.rank, torch.float32)
    return str(caught.value)


def test_different_sizes_are_named_on_all_ranks(ranks):
    """With both ranks and both sizes."""
    page = os.sysconf("SC_PAGE_SIZE")
    for error in ranks(2).run(_different_sizes, ONE_HOST[2]):
        for part in ("map_slices", f" {page} ", f" {2 * page} ", "rank 0", "rank 1"):
            assert part in error, error


def _kept(hosts: tuple[str, ...]) -> None:
    with communicator_on(hosts) as communicator:
        kept = _mapped(communicator, 2, torch.float32)
        communicator.slice_of(kept).fill_(communicator.rank + 1)
        communicator.barrier()
        if communicator.rank == 0:
            del kept
            communicator.empty(1 << 20, torch.float32).fill_(77)
        communicator.barrier()
    if communicator.rank == 0:
        return
    for rank, piece in enumerate(communicator.slices(kept)):
        assert (piece == rank + 1).all(), rank


@pytest.mark.parametrize("world_size", ONE_HOST)
def test_a_buffer_outlives_the_others_and_the_group(ranks, world_size):
    """Rank 0 drops its own at once."""
    ranks(world_size).run(_kept, ONE_HOST[world_size])


def _group_memories() -> int:
    """Of groups, mapped or open in this process: without a name, they are there as long as somebody has them."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:partita")
    files = Path("/proc/self/fd")
    links = [os.readlink(files / name) for name in os.listdir(files) if (files / name).is_symlink()]
    return mapped + sum("memfd:partita" in link for link in links)


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _many_groups(hosts: tuple[str, ...]) -> tuple[int, int]:
    def use_one() -> None:
        with communicator_on(hosts) as communicator:
            _mapped(communicator, MEBIBYTE // os.sysconf("SC_PAGE_SIZE"), torch.float32).fill_(1)
            assert _group_memories() > memories

    gc.collect()  # what earlier tests of this process have left
    memories = _group_memories()
    use_one()
    resident = _resident_bytes()
    for _ in range(50):
        use_one()
    return _group_memories() - memories, _resident_bytes() - resident


def test_memory_comes_back_with_the_group(ranks):
    """Fifty groups, each with a buffer."""
    for memories, grown_bytes in ranks(2).run(_many_groups, ONE_HOST[2]):
        assert memories == 0
        assert grown_bytes < 25 * MEBIBYTE
