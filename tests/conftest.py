from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hf_subjects import Subject, activate_alias
from hypothesis import HealthCheck, settings
from pairwise import pairwise
from partita.comm import leave_job
from ranks import RankPool
from warm_python import WarmPython


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--transport",
        choices=("auto", "torch"),
        default="auto",
        help="how the ranks of tests/distributed communicate where a test does not say: as the default config has it "
        "(shared memory), or over torch.distributed",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark `pairwise`, cases that add no pair of values of two parameters are slow."""
    cases: dict[str, dict[tuple[str, ...], pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise"):
            values = tuple(repr(value) for _, value in sorted(item.callspec.params.items()))
            cases.setdefault(item.nodeid.partition("[")[0], {})[values] = item
    for matrix in cases.values():
        for values in matrix.keys() - set(pairwise(matrix)):
            matrix[values].add_marker(pytest.mark.slow)


# How long an example takes says more about the machine than about the code.
settings.register_profile("partita", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("partita")

# A shell that runs the tests in the background has Ctrl-C ignored, and every process inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def ranks_of(ranks: Callable[[int], RankPool], transport: str) -> Iterator[Callable[..., RankPool]]:
    """ranks_of(subject, n): the pool in which a subject of `hf_subjects` trains; that of the alias has nothing else."""
    aliased: dict[int, RankPool] = {}

    def pool(subject: Subject, world_size: int) -> RankPool:
        if subject.kind != "alias":
            return ranks(world_size)
        made = aliased.setdefault(world_size, RankPool(world_size, transport))
        made.run(activate_alias)  # after a failure the ranks are new ones
        return made

    yield pool
    for made in aliased.values():
        made.close()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """For programs of their own: starts them without the seconds of an import of torch."""
    with WarmPython(tmp_path_factory.mktemp("python")) as warm:
        yield warm


@pytest.fixture(scope="session")
def fault_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of harness/fault_shim.c, for LD_PRELOAD."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = Path(__file__).parent / "harness" / "fault_shim.c"
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """as_rank(rank, world_size): this process is that one of a job, before it joins."""
    leave_job()

    def place(rank: int, world_size: int) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "nowhere", "MASTER_PORT": 1}.items():
            monkeypatch.setenv(name, str(value))

    return place
