"""DeepSpeed's public names, over Partita.

`import partita.compat.deepspeed as deepspeed` is one way. The other one leaves a program as it is: after `activate()`
(or `import partita.compat.deepspeed.auto`, or under `partita run`) `import deepspeed` gives this package.
"""

from __future__ import annotations

import importlib
from typing import Any

from partita import add_config_arguments, init_distributed
from partita.compat.deepspeed._activate import AlreadyImportedError, activate
from partita.compat.deepspeed._version import __version__
from partita.compat.deepspeed.accelerator import get_accelerator
from partita.compat.deepspeed.engine import DeepSpeedEngine, PipelineEngine, initialize
from partita.pipeline import PipelineModule

__version_major__, __version_minor__, __version_patch__ = (int(n) for n in __version__.partition("+")[0].split("."))

__all__ = [
    "AlreadyImportedError",
    "DeepSpeedEngine",
    "PipelineEngine",
    "PipelineModule",
    "__version__",
    "activate",
    "add_config_arguments",
    "get_accelerator",
    "init_distributed",
    "initialize",
]

ELSEWHERE = {
    "DeepSpeedConfig": "runtime.config",
    "DeepSpeedConfigError": "runtime.config",
    "zero": "runtime",
}
"""Names of this package that are those of another module; modules are imported when they are asked for."""


def __getattr__(name: str) -> Any:
    """A module of this package, or a name from `ELSEWHERE`.

    Raises:
        AttributeError: there is no such name.
    """
    if name in ELSEWHERE:
        return getattr(importlib.import_module(f"{__name__}.{ELSEWHERE[name]}"), name)
    if not name.startswith("__"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
