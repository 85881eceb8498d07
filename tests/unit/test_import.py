"""`import partita` in a fresh process: what it leaves to first use, and that first use then finds it."""

from __future__ import annotations

import subprocess
import sys

import partita
import partita.config
import pytest

LEFT_TO_FIRST_USE = ("pydantic", "pydantic_core", "annotated_types", "safetensors", "yaml", "typer", "rich")

WITHOUT_A_CONFIG = """
from partita.config import BatchSizes, ConfigError, default_config, load_config, resolve_batch_sizes, save_config
dir(partita), dir(partita.config), partita.default_config
with partita.zero.Init(enabled=False): pass
"""
# What a program does after `import partita`, and whether pydantic is imported by then.
FIRST_USES = {
    WITHOUT_A_CONFIG: False,
    "from partita import *; assert Config().seed == 1234 and Config is partita.Config is partita.config.Config": True,
    "assert isinstance(partita.config.load_config({'seed': 3}), partita.Config)": True,
    "assert partita.default_config()['seed'] == 1234": True,
}

PROGRAM = f"""
import sys
import torch
import partita
imported = [name for name in {LEFT_TO_FIRST_USE} if name in sys.modules]
assert imported == [], imported
assert not torch.cuda.is_initialized()
%s
assert ("pydantic" in sys.modules) is %s
assert "safetensors" not in sys.modules
"""


@pytest.mark.parametrize(("statement", "imports_pydantic"), FIRST_USES.items())
def test_libraries_are_imported_on_first_use(statement, imports_pydantic):
    command = [sys.executable, "-c", PROGRAM % (statement, imports_pydantic)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [partita, partita.config], ids=lambda module: module.__name__)
def test_dir_shows_every_public_name_and_an_unknown_one_is_named(module):
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute 'Confg'"):
        _ = module.Confg
