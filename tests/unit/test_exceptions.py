"""F24: every exception of the package crosses a process boundary, so a parent with a pool of workers hears of it."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import partita
import pytest
import torch
from partita import _core
from small_models import Regression, config
from torch import nn


def modules() -> Iterator[Any]:
    yield partita
    yield _core
    for found in pkgutil.walk_packages(partita.__path__, "partita."):
        yield importlib.import_module(found.name)


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
