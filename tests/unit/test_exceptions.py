"""F24: every exception of the package crosses a process boundary, so a parent with a pool of workers hears of it."""

from __future__ import annotations

import ast
import importlib
import multiprocessing as mp
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import partita
import pytest
import torch
from partita import _core
from small_models import Regression, config
from torch import nn

PACKAGE = Path(partita.__file__).parent
FOREIGN = ("partita.integrations", "partita.compat.deepspeed.auto", "partita.__main__")
"""Not imported: they bring libraries, change what `import deepspeed` means, and run."""


def modules() -> Iterator[Any]:
    yield _core
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("partita", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if not name.startswith(FOREIGN):
            yield importlib.import_module(name)


def test_what_is_not_imported_has_no_exceptions():
    """Or they would have to be told here."""
    foreign = [*(PACKAGE / "integrations").rglob("*.py"), PACKAGE / "compat/deepspeed/auto.py", PACKAGE / "__main__.py"]
    kinds = [
        node for path in foreign for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    bases = {ast.unparse(base) for kind in kinds for base in kind.bases}
    assert bases and not [base for base in bases if base.endswith(("Error", "Exception", "Interrupt"))]


def exceptions() -> set[type[BaseException]]:
    """Private ones too: they may be the cause of another one."""
    return {
        value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__.startswith("partita")
    }


def _wrong_order() -> None:
    engine = partita.Engine(Regression(), config=config())
    try:
        engine.step()
    finally:
        engine.destroy()


def _wrong_config() -> None:
    partita.Engine(Regression(), config={"train_batch_sizes": 2, "fp16": {"enabled": "maybe"}})


def _absent() -> None:
    from partita.units import make_absent

    parameter = nn.Parameter(torch.ones(2))
    make_absent([parameter])
    parameter.sum()


def _raise(kind: type[BaseException], text: str) -> None:
    raise kind(text)


# How a program meets them; what only a job of several ranks meets is raised by hand.
RAISED: dict[str, Callable[[], None]] = {
    "LifecycleError": _wrong_order,
    "ConfigError": _wrong_config,
    "AbsentParameterError": _absent,
}


def raise_by_name(name: str) -> None:
    if name in RAISED:
        RAISED[name]()
    kind = next(e for e in exceptions() if e.__name__ == name)
    _raise(kind, f"a {name} from a worker")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as made:
        yield made


def test_there_are_exceptions_to_raise():
    assert RAISED.keys() < {e.__name__ for e in exceptions()}
    assert _core.CommunicationError in exceptions()


@pytest.mark.parametrize("kind", sorted(exceptions(), key=lambda e: e.__name__), ids=lambda e: e.__name__)
def test_it_crosses_a_process_pool(pool, kind):
    """The same class with the same text arrives."""
    with pytest.raises(kind) as arrived:
        pool.submit(raise_by_name, kind.__name__).result(timeout=120)
    assert type(arrived.value) is kind
    with pytest.raises(kind) as here:
        raise_by_name(kind.__name__)
    assert str(arrived.value) == str(here.value) != ""
    again = pickle.loads(pickle.dumps(here.value))
    assert (type(again), again.args) == (kind, here.value.args)
