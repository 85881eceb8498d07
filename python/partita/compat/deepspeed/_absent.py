"""What a program learns that asks for a name of DeepSpeed's that is not here.

[Note: absent names] `module.name` raises AttributeError, so that `hasattr()` says False. `from module import name`
would make an ImportError of that, without its words. But of a package Python then tries to import `module.name` as a
module, and `AbsentModules` is asked, whose error it lets through. So every module here is a package, some with an empty
path.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from partita.compat.deepspeed._surface import PACKAGE, advice

_ELSEWHERE = "docs/deepspeed.md lists what is there"


def why_absent(name: str) -> str:
    """What to say of an absent name, dotted and beginning with "deepspeed."."""
    return f"Partita has no {name}: {advice(name) or _ELSEWHERE}"


def shown(name: str) -> str:
    """DeepSpeed's name of something in this package."""
    return "deepspeed" + name.removeprefix(PACKAGE)


def absent_names(module: str, elsewhere: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a module, asked for what it does not have: see [Note: absent names].

    Args:
        elsewhere: for a name, the module of this package that has it ("runtime.config").

    Returns:
        A function that gives such a name, or a module in this one, which it imports. Else it raises AttributeError.
    """
    vars(sys.modules[module]).setdefault("__path__", [])
    others = elsewhere or {}

    def get(name: str) -> Any:
        if name.startswith("__"):  # Python's own, which it asks for all the time
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if name in others:
            return getattr(importlib.import_module(f"{PACKAGE}.{others[name]}"), name)
        try:
            return importlib.import_module(f"{module}.{name}")
        except AbsentModuleError as error:
            raise AttributeError(str(error)) from None

    return get


def absent_attribute(name: str, owners: Sequence[str], error: AttributeError) -> AttributeError:
    """The error for an attribute that an object does not have, with the advice if one of DeepSpeed's has it.

    Args:
        owners: its classes, as DeepSpeed's pages call them.
        error: without the advice.
    """
    remedy = next((said for owner in owners if (said := advice(f"{owner}.{name}"))), "")
    return AttributeError(f"{error}: {remedy}" if remedy else str(error))


class Placeholder:
    """A class of DeepSpeed's that others import and that cannot be made.

    Raises:
        NotImplementedError: with what to do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = type(self)
        raise NotImplementedError(why_absent(f"{shown(own.__module__)}.{own.__name__}"))


class AbsentModuleError(ModuleNotFoundError):
    """A module of DeepSpeed's, or what a program took for one, is not here."""


class AbsentModules(MetaPathFinder):
    """Asked last: a module of this package that nothing else has found is none, and the error says what to do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Never finds anything.

        Raises:
            ModuleNotFoundError: the name is in this package.
        """
        if fullname.startswith(f"{PACKAGE}."):
            # With the real name `from package import name` would take the error for its own, and drop it.
            raise AbsentModuleError(why_absent(shown(fullname)), name=shown(fullname))
        return None


def watch_imports() -> None:
    """From here on, `import` of an absent module of this package says what to do."""
    if not any(isinstance(finder, AbsentModules) for finder in sys.meta_path):
        sys.meta_path.append(AbsentModules())
