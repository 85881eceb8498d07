"""Ranks whose disk can fail or be slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankPool


@pytest.fixture(scope="module")
def pool(transport: str) -> Iterator[RankPool]:
    """Two ranks of this file's own."""
    pool = RankPool(2, transport, fresh=True)
    yield pool
    pool.close()


@pytest.fixture
def faulty(pool: RankPool, fault_shim: Path, monkeypatch: pytest.MonkeyPatch) -> RankPool:
    """Ranks below the shim."""
    monkeypatch.setenv("LD_PRELOAD", str(fault_shim))  # of the processes that the pool starts
    return pool
