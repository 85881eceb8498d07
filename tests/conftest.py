from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ranks import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport",
        choices=("auto", "torch"),
        default="auto",
        help="how the ranks of tests/distributed communicate where a test does not say: as the default config has it "
        "(shared memory), or over torch.distributed",
    )


@pytest.fixture(scope="session")
def transport(pytestconfig: pytest.Config) -> str:
    """What --transport says: "auto" or "torch"."""
    return str(pytestconfig.getoption("--transport"))


@pytest.fixture(scope="session")
def ranks(transport: str) -> Iterator[Callable[[int], RankPool]]:
    """ranks(n): a pool of n processes that lives as long as the session."""
    pools: dict[int, RankPool] = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size, transport))
    for pool in pools.values():
        pool.close()
