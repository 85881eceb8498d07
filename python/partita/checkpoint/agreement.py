"""What one rank cannot do, none has done: errors of files, raised alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from partita.checkpoint.errors import CheckpointError
from partita.comm import Communicator, text_by_rank

T = TypeVar("T")


def together(world: Communicator, what: str, action: Callable[[], T], *, names_ranks: bool = True) -> T:
    """Does on each rank what may fail there. If it fails on any, all raise the same error. A collective.

    Args:
        what: has failed then; begins the message.
        names_ranks: the message has the ranks that failed, unless all did.

    Raises:
        CheckpointError: names the ranks, and what each of them said.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as problem:
        error = problem
    texts = text_by_rank(world, "" if error is None else _in_words(error))
    if not any(texts):
        return result  # type: ignore[return-value]
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(rank)
    everywhere = len(ranks) == 1 and world.world_size == len(next(iter(ranks.values())))
    if everywhere or not names_ranks:
        said = list(ranks)
    else:
        said = [f"rank {', '.join(map(str, where))}: {text}" for text, where in ranks.items()]
    raise CheckpointError(f"{what}: {'; '.join(said)}") from error


def from_rank_0(world: Communicator, what: str, action: Callable[[], str]) -> str:
    """What rank 0 says, on all ranks; its error too. A collective."""
    text = together(world, what, lambda: action() if world.rank == 0 else "", names_ranks=False)
    return text_by_rank(world, text)[0]


def _in_words(error: Exception) -> str:
    """A message alone says nothing where it is a key, say."""
    is_ours = isinstance(error, CheckpointError | ValueError | TypeError | OSError | RuntimeError)
    return str(error) if is_ours and str(error) else f"{type(error).__name__}: {error}"
