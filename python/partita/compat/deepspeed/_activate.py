"""Making `import deepspeed` mean `partita.compat.deepspeed`, in this process and in those that it spawns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any

from partita.compat.deepspeed._finder import ALIAS, REAL, AliasFinder

LOOKED_ALREADY = ("accelerate", "transformers.integrations.deepspeed", "lightning.fabric.strategies.deepspeed")
"""Modules that look for `deepspeed` once, when they are imported."""


class AlreadyImportedError(ImportError):
    """`activate()` came too late: something has been imported that has looked for `deepspeed` already."""


def activate() -> None:
    """From now on `import deepspeed`, `from deepspeed.x import y` and `importlib.metadata.version("deepspeed")` mean
    Partita. Once is enough, and further calls do nothing.

    Raises:
        AlreadyImportedError: `deepspeed`, or a library that has looked for it, is imported already; names it.
    """
    if is_active():
        return
    for name in (ALIAS, *LOOKED_ALREADY):
        if name in sys.modules:
            found = getattr(sys.modules[name], "__file__", None)
            raise AlreadyImportedError(
                f"{name} is imported already (from {found}), and has found DeepSpeed or that there is none: put "
                f"`import {REAL}.auto` before all other imports, or start the program with `partita run`"
            )
    sys.meta_path.insert(0, AliasFinder())
    importlib.invalidate_caches()
    vars(spawn)["get_preparation_data"] = _and_activate(spawn.get_preparation_data)


def is_active() -> bool:
    """Whether `import deepspeed` means Partita."""
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


class _InChild:
    """Unpickled in a spawned process, which happens before that process imports the program's main module."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return importlib.import_module, (f"{REAL}.auto",)


def _and_activate(prepare: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """What a spawned process is told first, by multiprocessing; with it, this."""

    def prepare_and_activate(name: str) -> dict[str, Any]:
        return {**prepare(name), REAL: _InChild()}

    return prepare_and_activate
