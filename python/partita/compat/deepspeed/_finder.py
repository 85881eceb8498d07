"""The name `deepspeed` for the modules of `partita.compat.deepspeed`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from partita.compat.deepspeed._version import __version__

ALIAS = "deepspeed"
REAL = "partita.compat.deepspeed"

_METADATA = f"""\
Metadata-Version: 2.1
Name: {ALIAS}
Version: {__version__}
Summary: DeepSpeed's names, over Partita
Author: the authors of Partita
"""
_FILES = {"METADATA": _METADATA, "PKG-INFO": _METADATA, "top_level.txt": f"{ALIAS}\n"}


def real_name(alias: str) -> str:
    """partita.compat.deepspeed.x for deepspeed.x; empty for the name of something else."""
    return REAL + alias[len(ALIAS) :] if alias == ALIAS or alias.startswith(f"{ALIAS}.") else ""


class AliasDistribution(Distribution):
    """What `importlib.metadata` knows of `deepspeed`: a name, a version, and who wrote it."""

    def read_text(self, filename: str) -> str | None:
        """A file of the distribution; None: it has no such file."""
        return _FILES.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Where a file of the distribution would be."""
        return Path(__file__).parent / path


class AliasLoader(Loader):
    """Gives the module with the real name: one module, and one of each class, under both names."""

    def __init__(self, real: str) -> None:
        self._real = real
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module with the real name, imported if need be."""
        module = importlib.import_module(self._real)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module its own spec back, which the import system has replaced. It has been executed."""
        module.__spec__ = self._spec


class AliasFinder(DistributionFinder):
    """Finds `deepspeed` and what is in it, before anything else on `sys.meta_path` does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a name of DeepSpeed's; None: it is not there, or the name is of something else."""
        real = real_name(fullname)
        found = importlib.util.find_spec(real) if real else None
        if found is None:
            return None
        spec = ModuleSpec(fullname, AliasLoader(real), origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        """The one distribution, where it or all are asked for."""
        wanted = None if context is None else context.name
        return [AliasDistribution()] if wanted is None or wanted.lower() == ALIAS else []
