"""`partita run`: a program of DeepSpeed's, as `python` runs it, with `import deepspeed` meaning Partita.

Nothing here imports typer: the program's process has nothing that the program did not ask for.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from partita.compat.deepspeed import activate

USAGE = """\
Usage: partita run SCRIPT [ARGS]...
       partita run -m MODULE [ARGS]...

Run a Python program with `import deepspeed` meaning Partita. Under a launcher:
torchrun --nproc-per-node 2 -m partita run SCRIPT [ARGS]..."""


def run(arguments: list[str]) -> None:
    """Runs a program in this process; returns when it ends, or leaves as it leaves.

    `sys.argv`, `sys.path`, `__main__`, tracebacks and exit codes are those that the program has under `python`.

    Args:
        arguments: of the command: a script or `-m` and a module, then the program's own.

    Raises:
        SystemExit: the program's; 1 after an error of its, which has been printed; 2: there is no program.
    """
    is_module = arguments[:1] == ["-m"]
    name, *own = [*arguments[is_module:]] or [""]
    if not is_module and name in ("-h", "--help"):
        print(USAGE)
        return
    if not name or name.startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    activate()
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(name))
    try:
        code, attributes = _module(name) if is_module else _script(name)
        sys.argv = [attributes["__file__"] if is_module else name, *own]
        main = ModuleType("__main__")
        vars(main).update(attributes, __builtins__=builtins)
        sys.modules["__main__"] = main
        exec(code, vars(main))
    except Exception as error:
        _print(error)
        sys.exit(1)


def _script(path: str) -> tuple[CodeType, dict[str, Any]]:
    file = os.path.join(os.getcwd(), path)  # as python writes it
    try:
        with io.open_code(file) as source:
            text = source.read()
    except OSError as error:
        print(f"partita run: can't open file {file!r}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    code = compile(text, file, "exec", dont_inherit=True)
    names = {"__spec__": None, "__package__": None, "__cached__": None}
    return code, {**names, "__file__": file, "__loader__": SourceFileLoader("__main__", file)}


def _module(name: str) -> tuple[CodeType, dict[str, Any]]:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(f"{error.name}."):
            raise  # a package of the program's has an error of its own
        spec = None  # there is no such package
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    code = getattr(spec.loader, "get_code", lambda _: None)(spec.name) if spec is not None else None
    if spec is None or code is None:
        print(f"partita run: no module named {name!r} that can be run", file=sys.stderr)
        sys.exit(1)
    names = {"__spec__": spec, "__package__": spec.parent, "__cached__": spec.cached}
    return code, {**names, "__file__": spec.origin, "__loader__": spec.loader}


def _print(error: Exception) -> None:
    """As the interpreter prints it, without the frames of this file."""
    error.__traceback__ = _of_program(error.__traceback__)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    vars(sys)["last_exc"] = error  # from Python 3.12 on
    sys.excepthook(type(error), error, error.__traceback__)


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
