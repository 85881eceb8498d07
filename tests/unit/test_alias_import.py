"""`import deepspeed` that means Partita: one set of modules under two names, and a refusal when it comes too late."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from partita.compat.deepspeed import AlreadyImportedError, activate
from partita.compat.deepspeed._activate import LOOKED_ALREADY, is_active

BOTH_NAMES = """
import partita.compat.deepspeed.auto
import importlib.metadata, importlib.util, pickle, sys
import deepspeed
import deepspeed.runtime.zero.partition_parameters as partition_parameters
import partita.compat.deepspeed as own
import partita.compat.deepspeed.runtime.zero.partition_parameters as own_parameters
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import Init

assert deepspeed is own and partition_parameters is own_parameters and deepspeed.__spec__.name == own.__name__
assert deepspeed.runtime.zero.partition_parameters is partition_parameters
assert DeepSpeedEngine is deepspeed.DeepSpeedEngine is own.DeepSpeedEngine and Init is deepspeed.zero.Init
assert issubclass(deepspeed.PipelineEngine, DeepSpeedEngine)
assert pickle.loads(pickle.dumps(DeepSpeedEngine)) is own.DeepSpeedEngine
partition_parameters.zero_wrapper_for_fp_tensor_constructor = "assigned"
assert own_parameters.zero_wrapper_for_fp_tensor_constructor == "assigned"

assert importlib.util.find_spec("deepspeed") is not None and importlib.util.find_spec("deepspeed.comm") is not None
assert importlib.metadata.version("deepspeed") == deepspeed.__version__
assert tuple(map(int, deepspeed.__version__.split("+")[0].split("."))) == (0, 19, 8)
assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
assert importlib.metadata.packages_distributions()["deepspeed"] == ["deepspeed"]
assert [d.name for d in importlib.metadata.distributions() if d.name == "torch"] == ["torch"]
for missing in ("deepspeed.there_is_no_such", "deepspeed_other", "partita.compat.there_is_no_such"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    raise AssertionError(missing)
deepspeed.activate()
assert len([f for f in sys.meta_path if type(f).__name__ == "AliasFinder"]) == 1
"""


def test_modules_and_classes_are_the_same_under_both_names(python):
    done = subprocess.run([*python.command, "-c", BOTH_NAMES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_import_partita_brings_nothing_of_it(python):
    """Neither modules nor a finder."""
    program = (
        "import sys; before = list(sys.meta_path); import torch, partita\n"
        "assert not [n for n in sys.modules if n.startswith(('partita.compat', 'partita.integrations', 'deepspeed'))]\n"
        "assert [f for f in sys.meta_path if type(f).__module__.startswith('partita')] == []"
    )
    done = subprocess.run([*python.command, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["deepspeed", "accelerate", "transformers.integrations.deepspeed"])
def test_it_is_refused_by_name_where_somebody_has_looked_already(monkeypatch, name):
    """A refusal changes nothing. The module is a stand-in: its name is what counts."""
    for other in LOOKED_ALREADY:
        monkeypatch.delitem(sys.modules, other, raising=False)
    stand_in = ModuleType(name)
    stand_in.__file__ = "/somewhere/file.py"
    monkeypatch.setitem(sys.modules, name, stand_in)
    before = list(sys.meta_path)
    with pytest.raises(AlreadyImportedError) as raised:
        activate()
    assert f"{name} is imported already (from /somewhere/file.py)" in str(raised.value)
    assert "put `import partita.compat.deepspeed.auto` before all other imports" in str(raised.value)
    assert sys.meta_path == before and not is_active()
