"""DeepSpeed's documented names: each has an answer that is true, the page is current, absent names say what to do."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partita.compat.deepspeed as deepspeed
import pytest
from partita.compat.deepspeed._surface import Answer, Row, all_rows
from partita.compat.deepspeed.document import MARKDOWN_NAME, write_document
from surface import exercised, exercises
from torch import nn

ROOT = Path(__file__).parents[2]
ABSENT = [row for row in all_rows() if row.answer is Answer.ABSENT]
PRESENT = [row for row in all_rows() if row.answer is not Answer.ABSENT]


@pytest.fixture(scope="module")
def objects() -> Iterator[dict[str, Any]]:
    """One of some classes: attributes are perhaps of the object, not of the class."""
    layer = deepspeed.initialize(model=nn.Linear(2, 2), config={"train_batch_size": 1})[0]
    model = deepspeed.PipelineModule([nn.Linear(2, 2)], num_stages=1, loss_fn=nn.MSELoss())
    pipeline = deepspeed.initialize(model=model, config={"train_batch_size": 1})[0]
    profiler = deepspeed.profiling.flops_profiler.FlopsProfiler(nn.Linear(2, 2))
    yield {
        "deepspeed.DeepSpeedEngine": layer,
        "deepspeed.PipelineEngine": pipeline,
        "deepspeed.pipe.PipelineModule": model,
        "deepspeed.zero.Init": deepspeed.zero.Init(enabled=False),
        "deepspeed.profiling.flops_profiler.FlopsProfiler": profiler,
    }
    layer.destroy()
    pipeline.destroy()


def value_of(row: Row, objects: dict[str, Any]) -> Any:
    """What has the row's name."""
    owner, _, last = row.name.rpartition(".")
    if owner in objects:
        return getattr(objects[owner], last)
    found = deepspeed
    for name in row.name.split(".")[1:]:
        found = getattr(found, name)
    return found


# -- the table


def test_every_name_has_one_row_and_every_row_says_something():
    assert max(Counter(row.name for row in all_rows()).values()) == 1
    assert all(row.how.strip() and "|" not in row.how for row in all_rows())


def test_the_table_has_what_the_pages_of_deepspeed_name():
    """Those of docs/ of DeepSpeed 0.19.8: directives of its API pages and, where these show members or of an engine,
    the members; calls and imports of its tutorials."""
    named = (ROOT / "tests" / "unit" / "deepspeed-0.19.8-api.txt").read_text().split()
    names = {row.name for row in all_rows()}
    nowhere = {row.name for row in PRESENT if row.how.startswith("can be imported")} | {row.name for row in ABSENT}

    def is_answered(name: str) -> bool:
        name = name if name in names else name.replace(".PipelineEngine.", ".DeepSpeedEngine.")  # which it is
        return name in names or any(
            each.startswith(f"{name}.") or name.startswith(f"{other}.") for each in names for other in nowhere
        )

    assert [name for name in named if not is_answered(name)] == []


def test_the_committed_page_is_current(tmp_path):
    write_document(tmp_path)
    committed = (ROOT / "docs" / MARKDOWN_NAME).read_text(encoding="utf-8")
    assert committed == (tmp_path / MARKDOWN_NAME).read_text(encoding="utf-8"), "run: make docs"


# -- what is there


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.name)
def test_what_is_there_resolves(row: Row, objects: dict[str, Any]):
    value_of(row, objects)


def test_what_is_there_is_called_by_a_test():
    """And no test calls a name that has no row."""
    assert sorted(exercised()) == sorted(row.name for row in PRESENT)


# -- what is not there


@pytest.mark.parametrize("row", ABSENT, ids=lambda row: row.name)
def test_what_is_absent_says_what_to_do(row: Row, objects: dict[str, Any]):
    with pytest.raises((AttributeError, ImportError)) as raised:
        value_of(row, objects)
    said = str(raised.value)
    assert row.name.rpartition(".")[2] in said or "has no deepspeed" in said
    assert row.how in said or any(other.how in said for other in ABSENT if row.name.startswith(f"{other.name}."))


@pytest.mark.parametrize(
    "statement",
    [
        "import partita.compat.deepspeed.autotuning.autotuner",
        "from partita.compat.deepspeed.autotuning.autotuner import Autotuner",
        "from partita.compat.deepspeed import autotuning, init_inference",
    ],
)
def test_imports_of_what_is_absent_say_what_to_do(statement: str):
    with pytest.raises(ModuleNotFoundError, match=r"^Partita has no deepspeed\.autotuning: `memory_breakdown`"):
        exec(statement, {})


def test_a_name_of_a_module_that_is_no_package_says_so_too():
    with pytest.raises(ImportError, match=r"add_tuning_arguments: write `scheduler` into the config"):
        exec("from partita.compat.deepspeed.runtime.lr_schedules import add_tuning_arguments", {})


def test_a_name_that_nobody_knows_is_absent_as_well():
    assert not hasattr(deepspeed, "no_such_name") and not hasattr(deepspeed.utils, "no_such_name")
    with pytest.raises(ImportError, match=r"docs/deepspeed\.md"):
        exec("from partita.compat.deepspeed.utils import no_such_name", {})


def test_a_module_whose_own_import_fails_is_not_called_absent(monkeypatch):
    """safetensors is missing, say: the error names it."""
    monkeypatch.setitem(sys.modules, "partita.compat.deepspeed._surface", None)
    monkeypatch.delitem(sys.modules, "partita.compat.deepspeed.document")
    with pytest.raises(ImportError, match="_surface"):
        importlib.import_module("partita.compat.deepspeed.document")


@exercises("ops.", "lion.DeepSpeedCPULion lion.FusedLion lamb.FusedLamb")
def test_optimizers_that_cannot_be_made_say_what_to_do():
    """Libraries import them whether they use them or not."""
    from partita.compat.deepspeed.ops.lamb import FusedLamb
    from partita.compat.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    for kind in (DeepSpeedCPULion, FusedLion, FusedLamb):
        with pytest.raises(NotImplementedError, match="and not made: "):
            kind([nn.Parameter(nn.Linear(1, 1).weight)])
