"""Whether all ranks were given the same, and the first difference if not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from partita.comm.agree import by_rank, ranks_that_differ, text_by_rank
from partita.comm.communicator import Communicator

Entries = Sequence[tuple[str, str]]
"""(name, value) of what must be the same on all ranks, for people; names are unique, and their order counts too."""

_BETWEEN_ENTRIES, _BEFORE_VALUE = "\x1e", "\x1f"  # the separators of ASCII


def require_same(communicator: Communicator, entries: Entries) -> None:
    """Raises on all ranks, with one text, unless all have the same entries. A collective.

    Costs one small all-gather. Only where something differs the entries themselves travel.

    Raises:
        ValueError: names the first entry that differs, and both values.
    """
    text = _BETWEEN_ENTRIES.join(f"{name}{_BEFORE_VALUE}{value}" for name, value in entries)
    if not ranks_that_differ(communicator, text.encode(errors="surrogatepass")):
        return
    first = _entries(_text_of_rank_0(communicator, text))
    found = text_by_rank(communicator, first_difference(first, entries, communicator.rank))
    differences = [difference for difference in found if difference]
    more = f" (and {len(differences) - 1} more ranks differ from rank 0)" if len(differences) > 1 else ""
    raise ValueError(f"the ranks of this job were not given the same: {differences[0]}{more}")


def first_difference(first: Entries, own: Entries, rank: int) -> str:
    """What differs between the entries of rank 0 and those of `rank`; empty if nothing does."""
    there, here = dict(first), dict(own)
    for name, value in first:
        if name not in here:
            return f"{name} is {value} on rank 0 and missing on rank {rank}"
        if here[name] != value:
            return f"{name} is {value} on rank 0 and {here[name]} on rank {rank}"
    for name, value in own:
        if name not in there:
            return f"{name} is missing on rank 0 and {value} on rank {rank}"
    for (name, _), (other, _) in zip(first, own, strict=True):
        if name != other:
            return f"the order differs: {name} on rank 0 stands where {other} does on rank {rank}"
    return ""


def digest_number(text: str, below: int) -> int:
    """A number from 0 to `below` that is the same for the same text, and rarely for another."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % below


def _entries(text: str) -> Entries:
    pairs = [entry.partition(_BEFORE_VALUE) for entry in text.split(_BETWEEN_ENTRIES)] if text else []
    return [(name, value) for name, _, value in pairs]


def _text_of_rank_0(communicator: Communicator, text: str) -> str:
    data = text.encode(errors="surrogatepass") if communicator.rank == 0 else b""
    length = int(by_rank(communicator, len(data))[0])
    buffer = torch.zeros(length, dtype=torch.uint8, device=communicator.device)
    if communicator.rank == 0 and length:
        buffer.copy_(communicator.to_device(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
    communicator.broadcast(buffer, 0).wait()
    return bytes(communicator.to_host(buffer).tolist()).decode(errors="surrogatepass")
