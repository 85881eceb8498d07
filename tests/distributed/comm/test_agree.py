"""How ranks come to one answer: what each says reaches all, and an error of one is raised by all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from partita.comm import (
    CommunicationError,
    Communicator,
    SingleProcess,
    any_rank,
    any_rank_each,
    by_rank,
    raise_together,
    ranks_that_differ,
    text_by_rank,
    world_communicator,
)

SIZES = (2, 3)
TRANSPORTS = ("shared_memory", "torch")
# By rank. Of no length, of one byte, with characters of several bytes, with a byte that is no UTF-8, a long one.
TEXTS = (
    ("", "a", "bc"),
    ("", "", ""),
    ("grüß \N{SNOWMAN}", "", "caf\udce9"),
    ("x" * 100_000, "y\0z\0", "\0"),
)

everywhere = pytest.mark.parametrize(("size", "path"), [(n, t) for n in SIZES for t in TRANSPORTS])


@contextmanager
def communicating(transport: str) -> Iterator[Communicator]:
    communicator = world_communicator(transport)
    yield communicator
    communicator.barrier()
    communicator.close()


def _flags(transport: str) -> dict[str, Any]:
    with communicating(transport) as c:
        last = c.world_size - 1
        return {
            "any, of nobody": any_rank(c, False),
            "any, of one each": [any_rank(c, c.rank == r) for r in range(c.world_size)],
            "any, of all": any_rank(c, True),
            "each": any_rank_each(c, [False, c.rank == 0, c.rank == last, True]),
            "none": any_rank_each(c, []),
        }


@everywhere
def test_conditions(ranks, size, path):
    """On one rank, whichever, on all, on none."""
    expected = {
        "any, of nobody": False,
        "any, of one each": [True] * size,
        "any, of all": True,
        "each": [False, True, True, True],
        "none": [],
    }
    assert ranks(size).run(_flags, path) == [expected] * size


def _values(transport: str) -> tuple[list[list[float]], list[list[str]]]:
    with communicating(transport) as c:
        values = [by_rank(c, v) for v in (2**53 - c.rank, -0.1 * c.rank, (math.nan, math.inf, -math.inf)[c.rank])]
        return values, [text_by_rank(c, texts[c.rank]) for texts in TEXTS]


@everywhere
def test_values_and_texts_by_rank(ranks, size, path):
    """Bit for bit, on every rank."""
    for values, texts in ranks(size).run(_values, path):
        assert values[0] == [2**53 - r for r in range(size)]
        assert values[1] == [-0.1 * r for r in range(size)]
        assert repr(values[2]) == repr([math.nan, math.inf, -math.inf][:size])
        assert texts == [list(by_rank_[:size]) for by_rank_ in TEXTS]


def _differing(transport: str) -> list[list[int]]:
    with communicating(transport) as c:
        long = b"weights " * 100_000
        return [
            ranks_that_differ(c, long),
            ranks_that_differ(c, long + (b"." if c.rank == c.world_size - 1 else b"")),
            ranks_that_differ(c, b"0" if c.rank == 0 else b"1"),
            ranks_that_differ(c, b""),
        ]


@everywhere
def test_ranks_that_differ(ranks, size, path):
    """From rank 0: none, the last, all others."""
    expected = [[], [size - 1], list(range(1, size)), []]
    assert ranks(size).run(_differing, path) == [expected] * size


class OddError(LookupError):
    """An error that cannot be made from a text."""

    def __init__(self, number: int, of: int) -> None:
        super().__init__(f"{number} of {of}")


def _undecodable() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "value": (lambda: ValueError("a bad value"), "ValueError"),
    "file": (lambda: FileNotFoundError(2, "No such file", "caf\udce9"), "FileNotFoundError"),
    "communication": (lambda: CommunicationError("rank 1 died"), "CommunicationError"),
    "own class": (lambda: OddError(3, 4), "LookupError"),
    "undecodable": (_undecodable, "UnicodeError"),
    "key": (lambda: KeyError("exp_avg"), "LookupError"),
    "silent": (lambda: RuntimeError(), "RuntimeError"),
}


def _raised(transport: str, culprits: tuple[int, ...], what: str) -> list[tuple[str, str, bool]]:
    """For each error: type, message, and whether it is this rank's own object; the group works after each."""
    outcomes = []
    with communicating(transport) as c:
        for make, _ in ERRORS.values():
            own = make() if c.rank in culprits else None
            try:
                raise_together(c, own, what)
                outcomes.append(("nothing", "", False))
            except Exception as error:
                outcomes.append((type(error).__name__, str(error), error is own))
            assert by_rank(c, c.rank) == list(range(c.world_size))
    return outcomes


@everywhere
def test_an_error_of_one_rank_is_raised_by_all(ranks, size, path):
    """By the rank at fault its own; by the others one of the same kind, that says where and what."""
    culprit = size - 1
    for rank, outcomes in enumerate(ranks(size).run(_raised, path, (culprit,), "saving failed:")):
        for (kind, message, is_own), (make, expected) in zip(outcomes, ERRORS.values(), strict=True):
            own = make()
            if rank == culprit:
                assert (kind, message, is_own) == (type(own).__name__, str(own), True)
            else:
                text = str(own) or "RuntimeError"
                assert (kind, message) == (expected, f"saving failed: on rank {culprit}: {text}")


@pytest.mark.parametrize("path", TRANSPORTS)
def test_errors_of_several_ranks(ranks, path):
    """The rank without one hears of all of them, of the same text once; the others raise their own."""
    _, outcomes, _ = ranks(3).run(_raised, path, (0, 2), "")
    assert outcomes[0] == ("ValueError", "on rank 0, 2: a bad value", False)
    for rank, own in enumerate(ranks(3).run(_raised, path, (0, 1, 2), "")):
        assert all(is_own for _, _, is_own in own), rank


def _different_errors(transport: str) -> str:
    with communicating(transport) as c:
        try:
            raise_together(c, None if c.rank == 0 else OSError(f"disk {c.rank} is full"), "saving failed:")
        except OSError as error:
            return str(error)
    return ""


def test_different_errors_of_several_ranks(ranks):
    """Each with its rank."""
    first, *others = ranks(3).run(_different_errors, "shared_memory")
    assert first == "saving failed: on rank 1: disk 1 is full; on rank 2: disk 2 is full"
    assert others == ["disk 1 is full", "disk 2 is full"]


@everywhere
def test_without_an_error_nobody_raises(ranks, size, path):
    """And the ranks stay in step."""
    assert ranks(size).run(_raised, path, (), "") == [[("nothing", "", False)] * len(ERRORS)] * size


def test_one_process_agrees_with_itself():
    """The same answers, and its own error."""
    alone = SingleProcess()
    assert [any_rank(alone, c) for c in (False, True)] == [False, True]
    assert any_rank_each(alone, [True, False]) == [True, False]
    assert by_rank(alone, -1.5) == [-1.5]
    assert [text_by_rank(alone, text) for text in ("", "grüß")] == [[""], ["grüß"]]
    assert ranks_that_differ(alone, b"anything") == []
    raise_together(alone, None)
    error = OddError(1, 2)
    with pytest.raises(OddError) as raised:
        raise_together(alone, error, "loading")
    assert raised.value is error
