"""C2: EIO, ENOSPC and short writes at every call of a save, and a full disk: one error on all ranks, old ones stay."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from failing_saves import (
    FAIL,
    FAIL_FROM_HERE,
    FILES,
    LATEST,
    SAME,
    SHORT,
    Fault,
    Outcome,
    fill_disk,
    limit_files,
    try_faults,
)
from killed_saves import RANKS, config_of
from ranks import RankPool

REMOVALS = ("unlink", "rmdir")
# What a save consists of, so that none of it is left out by mistake.
CALLS = {
    (0, True): {"mkdir", "create", "allocate", "write", "fsync", "exchange", "rename", "unlink", "rmdir"},
    (0, False): {"mkdir", "create", "allocate", "write", "fsync", "rename", "unlink"},
    (1, True): {"write", "fsync"},
    (1, False): {"write", "fsync"},
}


def outcomes(pool: RankPool, function: Any, *arguments: Any) -> list[Outcome]:
    """Of rank 0, after it is clear that the ranks agree on all that both can know."""
    first, second = pool.run(function, *arguments)
    for a, b in zip(first, second, strict=True):
        assert a.said == b.said, f"{a.of}: the ranks say different things"
        a.wrong = sorted({*a.wrong, *b.wrong})
        a.calls = a.calls or b.calls
    return list(first)


def problems(outcome: Outcome, folder: Path) -> list[str]:
    """What is not as it should be after a fault."""
    fault, (before, after), wrong = outcome.of, outcome.there, list(outcome.wrong)
    tag = SAME if fault.same else f"new{outcome.step}"
    failed = next((i for i, (_, how, _) in enumerate(outcome.calls) if how == "failed"), len(outcome.calls))
    names = [call for call, _, _ in outcome.calls]
    tells = failed < len(names) and names[failed] not in REMOVALS
    committed = fault.rank == 0 and not {"exchange", "rename"}.isdisjoint(names[:failed])
    if fault.kind in (FAIL, FAIL_FROM_HERE) and failed == len(names):
        wrong.append(f"the fault did not happen: {outcome.calls}")
    if bool(outcome.said) != tells:
        wrong.append(f"says '{outcome.said}'")
    if tells:
        words = [f"'{folder / tag}' was not saved", os.strerror(fault.error), *(["rank 1: "] if fault.rank else [])]
        wrong += [f"'{word}' is not in: {outcome.said}" for word in words if word not in outcome.said]
        wrong += ["more than a line"] if "\n" in outcome.said else []
    if after != (before | {tag: outcome.step} if committed or not tells else before):
        wrong.append(f"leads from {before} to {after}")
    if outcome.left and fault.kind == FAIL and tells and not committed:
        wrong.append(f"leaves {outcome.left}")
    if outcome.latest not in ({before[SAME], outcome.step} if committed else {before[SAME] if tells else outcome.step}):
        wrong.append(f"the latest is {outcome.latest}")
    return [f"{fault} {names[failed : failed + 1]}: {line}" for line in wrong]


def calls_of(pool: RankPool, folder: Path, config: dict[str, Any], rank: int, same: bool) -> list[str]:
    """The calls of a save without a fault."""
    (outcome,) = outcomes(pool, try_faults, str(folder), config, str(folder.parent), [Fault(rank, same=same)])
    assert problems(outcome, folder) == []
    names = [call for call, _, _ in outcome.calls]
    assert set(names) == CALLS[rank, same]
    return names


def fail_calls(
    pool: RankPool,
    tmp_path: Path,
    rank: int,
    same: bool,
    kinds: list[tuple[int, int]],
    *,
    every_write: int = 1,
    beside: bool = False,
) -> None:
    """A save per call and kind of fault (kind, errno). Only writes can be short; of them `every_write`-th ones fail."""
    config = config_of(2, "split", pool.transport, beside=beside)
    names = calls_of(pool, tmp_path / "without", config, rank, same)
    faults = [
        Fault(rank, number, kind, error, same)
        for number, name in enumerate(names, 1)
        for kind, error in kinds
        if (kind != SHORT or name == "write") and (name != "write" or number % every_write == 0)
    ]
    folder = tmp_path / "with"
    found = outcomes(pool, try_faults, str(folder), config, str(tmp_path), faults)
    print(f"{len(found)} faults, {len(names)} calls")
    assert len(found) == len(faults) > 2
    assert [line for outcome in found for line in problems(outcome, folder)] == []


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_call_that_fails_is_told_on_all_ranks(faulty, tmp_path, rank):
    """Every call but some writes. What was there loads, the engine goes on, and its next save works and leaves
    nothing."""
    fail_calls(faulty, tmp_path, rank, True, [(FAIL, errno.EIO)], every_write=3)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_call_that_fails_makes_no_new_tag(faulty, tmp_path, rank):
    fail_calls(faulty, tmp_path, rank, False, [(FAIL, errno.ENOSPC)], every_write=8)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_call_that_fails_beside_training_is_told_on_all_ranks(faulty, tmp_path, rank):
    fail_calls(faulty, tmp_path, rank, True, [(FAIL, errno.EIO)], every_write=8, beside=True)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_short_write_is_none(faulty, tmp_path, rank):
    """The rest is written too."""
    fail_calls(faulty, tmp_path, rank, True, [(SHORT, 0)], every_write=3)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False], ids=["the same tag", "a new tag"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_every_fault_is_told_on_all_ranks(faulty, tmp_path, rank, same):
    """Every call with every error, alone and with all that follow it: a disk that is gone."""
    kinds = [(kind, error) for kind in (FAIL, FAIL_FROM_HERE) for error in (errno.EIO, errno.ENOSPC)]
    fail_calls(faulty, tmp_path, rank, same, [*kinds, (SHORT, 0)])


# -- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this user cannot mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_told_before_anything_is_touched(ranks, transport, small_disk):
    """Whatever is the first file for which there is no room."""
    folder = small_disk / "checkpoints"
    found = outcomes(ranks(RANKS), fill_disk, str(folder), config_of(2, "split", transport))
    assert [outcome.of for outcome in found] == [(name, tag) for name in (*FILES, "") for tag in (SAME, "new")]
    for outcome in found:
        assert outcome.wrong == [], outcome.of
        (name, tag), (before, after) = outcome.of, outcome.there
        if not name:  # there is room for all
            assert outcome.said == "" and after == before | {tag: outcome.step}
            continue
        assert outcome.said.startswith(
            f"the checkpoint '{folder / tag}' was not saved: [Errno 28] No space left on device"
        )
        assert f".{name}.partial-" in outcome.said if name == LATEST else f"/{name}'" in outcome.said
        assert after == before and outcome.latest == before[SAME]


# The files have some 17,000 and 77,000 bytes. Rank 1 writes to the end of each.
LIMITS = [(0, 100), (0, 20_000), (1, 100), (1, 20_000), (1, 70_000)]


def test_a_file_that_may_not_grow_is_told_before_anything_is_touched(ranks, transport, tmp_path):
    """The limit of one rank, also of one that does not make the files."""
    folder = tmp_path / "checkpoints"
    found = outcomes(ranks(RANKS), limit_files, str(folder), config_of(2, "split", transport), LIMITS)
    for outcome in found:
        rank, limit = outcome.of
        assert outcome.wrong == [], outcome.of
        where = "rank 1: " if rank else ""
        assert outcome.said.startswith(
            f"the checkpoint '{folder / SAME}' was not saved: {where}[Errno 27] File too large"
        )
        # Rank 0 makes the model's file first; other ranks write the optimizer's first.
        assert ("model.safetensors" if (rank, limit) == (0, 100) else "optimizer.safetensors") in outcome.said
        assert outcome.there[0] == outcome.there[1]
