"""How ranks come to one answer. Every function here is a collective: all ranks of the communicator call it together.

What a rank says is small, so these collectives favour plain code over speed. Each waits for its result.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Sequence

import torch

from partita._core import CommunicationError, Reduction
from partita.comm.communicator import Communicator
from partita.device.memory import HOST

DIGEST_BYTES = 32
NAMED_ERRORS = 3  # in the message of a rank that has no error of its own


def any_rank(communicator: Communicator, condition: bool) -> bool:
    """Whether the condition holds on at least one rank."""
    return any_rank_each(communicator, [condition])[0]


def any_rank_each(communicator: Communicator, conditions: Sequence[bool]) -> list[bool]:
    """For each of several conditions, whether it holds on at least one rank. All ranks give equally many."""
    if not conditions:
        return []
    own = torch.tensor([float(c) for c in conditions], dtype=torch.float64, device=HOST)
    flags = communicator.to_device(own)
    communicator.all_reduce(flags, Reduction.max).wait()
    return [bool(flag) for flag in communicator.to_host(flags).tolist()]


def by_rank(communicator: Communicator, value: float) -> list[float]:
    """Every rank's value, by rank. Integers up to 2^53 arrive as they are."""
    values = torch.zeros(communicator.world_size, dtype=torch.float64, device=communicator.device)
    values[communicator.rank] = value
    communicator.all_gather(values).wait()
    return [float(v) for v in communicator.to_host(values).tolist()]


def numbers_by_rank(communicator: Communicator, numbers: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, by rank. All ranks give equally many."""
    values = torch.zeros((communicator.world_size, len(numbers)), dtype=torch.float64, device=communicator.device)
    own = torch.tensor(numbers, dtype=torch.float64, device=HOST)
    values[communicator.rank] = communicator.to_device(own)
    communicator.all_gather(values.view(-1)).wait()
    return [[float(each) for each in row] for row in communicator.to_host(values).tolist()]


def text_by_rank(communicator: Communicator, text: str) -> list[str]:
    """Every rank's text, by rank. Texts may be empty and of different lengths."""
    data = text.encode(errors="surrogatepass")  # names of files may hold bytes that are no UTF-8
    lengths = [int(length) for length in by_rank(communicator, len(data))]
    padded = _bytes_by_rank(communicator, data.ljust(max(lengths), b"\0"))
    return [p[:length].decode(errors="surrogatepass") for p, length in zip(padded, lengths, strict=True)]


def ranks_that_differ(communicator: Communicator, data: bytes) -> list[int]:
    """The ranks whose data are not equal to rank 0's. Compares digests, so the data may be long."""
    digests = _bytes_by_rank(communicator, hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest())
    return [rank for rank, digest in enumerate(digests) if digest != digests[0]]


def raise_together(communicator: Communicator, error: Exception | None, what: str = "") -> None:
    """Raises on all ranks if any rank has an error, so that no rank goes on and waits for one that has raised.

    A rank with an error raises that error. The other ranks raise an error of the same kind, which names the ranks at
    fault and says what they said. The kind is the built-in exception that the first error at fault is, or derives from;
    a CommunicationError stays one.

    Args:
        error: this rank's; None: it has none.
        what: begins the message on ranks without an error: what has failed.
    """
    if not any_rank(communicator, error is not None):
        return
    kinds = text_by_rank(communicator, "" if error is None else _kind_of(error))
    texts = text_by_rank(communicator, "" if error is None else str(error))
    if error is not None:
        raise error
    ranks: dict[str, list[int]] = {}  # by what they said
    for rank, kind in enumerate(kinds):
        if kind:
            ranks.setdefault(texts[rank] or kind, []).append(rank)
    said = [f"on rank {', '.join(map(str, where))}: {text}" for text, where in ranks.items()]
    more = f"; and {len(said) - NAMED_ERRORS} more" if len(said) > NAMED_ERRORS else ""
    message = f"{what} {'; '.join(said[:NAMED_ERRORS])}{more}".lstrip()
    raise _exception(next(kind for kind in kinds if kind), message)


def _bytes_by_rank(communicator: Communicator, data: bytes) -> list[bytes]:
    """Every rank's data, by rank. All ranks give equally many bytes."""
    if not data:
        return [data] * communicator.world_size
    gathered = torch.zeros(communicator.world_size * len(data), dtype=torch.uint8, device=communicator.device)
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    communicator.slice_of(gathered).copy_(communicator.to_device(own))
    communicator.all_gather(gathered).wait()
    everything = communicator.to_host(gathered).numpy().tobytes()
    return [everything[begin : begin + len(data)] for begin in range(0, len(everything), len(data))]


def _kind_of(error: Exception) -> str:
    """The name of the first of an error's classes that `_exception` can make."""
    if isinstance(error, CommunicationError):
        return CommunicationError.__name__
    return next(kind.__name__ for kind in type(error).__mro__ if _takes_a_message(kind))


def _takes_a_message(kind: type) -> bool:
    """Whether this is a built-in exception that a text alone makes, and that shows the text as it is."""
    if getattr(builtins, kind.__name__, None) is not kind or kind is KeyError:
        return False
    try:
        return isinstance(kind(""), Exception)
    except TypeError:
        return False


def _exception(kind: str, message: str) -> Exception:
    if kind == CommunicationError.__name__:
        return CommunicationError(message)
    made: Exception = getattr(builtins, kind)(message)
    return made
