"""What the package offers: its frozen surface, docstrings and annotations, and the stub of the native module."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partita
import pytest
from partita import _core

PACKAGE = Path(partita.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
STUB = PACKAGE / "_core.pyi"

PUBLIC_NAMES = [
    "CommunicationError",
    "Config",
    "ConfigError",
    "Engine",
    "FusedAdam",
    "LifecycleError",
    "PipelineEngine",
    "Preempted",
    "RepeatingLoader",
    "__version__",
    "add_config_arguments",
    "default_config",
    "init_distributed",
    "initialize",
    "nn",
    "utils",
    "zero",
]
PUBLIC_NAMES_SEEN = [name for name in PUBLIC_NAMES if name != "__version__"]  # by dir()
ENGINE_CALLS = [
    "add_module",  # refused, as are the other ones that would change what an engine trains
    "backward",
    "compile",
    "destroy",
    "device",
    "eval_batch",
    "forward",
    "get_global_grad_norm",
    "get_lr",
    "global_rank",
    "global_samples",
    "global_steps",
    "grad_norm_tensor",
    "gradient_accumulation_steps",
    "initialize",
    "is_gradient_accumulation_boundary",
    "last_known_step_was_skipped",
    "load_checkpoint",
    "load_module_state_dict",
    "load_state_dict",
    "local_rank",
    "log",
    "log_comms",
    "loss_scale",
    "micro_steps",
    "module_state_dict",
    "no_sync",
    "register_buffer",
    "register_parameter",
    "save_16bit_model",
    "save_checkpoint",
    "save_config",
    "save_model",
    "save_under_way",
    "scale",
    "set_gradient_accumulation_boundary",
    "set_gradient_clipping",
    "share_memory",
    "skipped_steps",
    "state_dict",
    "step",
    "sync_buffers",
    "token_mean",
    "train_batch",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "train_state",
    "training",
    "wait_for_save",
    "waits",
    "was_step_applied",
    "weights",
    "world_size",
    "zero_grad",
]


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_public_names_are_these():
    """A change of the surface is a decision, made here too."""
    assert list(partita.__all__) == PUBLIC_NAMES
    assert all(hasattr(partita, name) for name in PUBLIC_NAMES)
    assert [name for name in dir(partita) if not name.startswith("__")] == PUBLIC_NAMES_SEEN


def test_the_engine_has_these_calls():
    """As above: the names that DeepSpeed's users know, and our own, beside those of `nn.Module`."""
    bases = [base for base in partita.Engine.__mro__ if base.__module__.startswith("partita")]
    own = {name for base in bases for name in vars(base) if not name.startswith("_") and name != "module"}
    assert sorted(own) == ENGINE_CALLS


# -- docstrings and annotations


def public_definitions(path: Path) -> Iterator[tuple[str, Any]]:
    """(qualified name, syntax node) of the public classes and functions of a module, methods included."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Any]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")

    yield from walk(ast.parse(path.read_text()).body, "")


def has_docstring(path: Path, name: str, node: Any) -> bool:
    """Of its own; a method that overrides another may inherit it."""
    if ast.get_docstring(node) or "." not in name:
        return bool(ast.get_docstring(node))
    owner_name, _, method = name.rpartition(".")
    owner = getattr(importlib.import_module(dotted(path)), owner_name)
    return any(inspect.getdoc(getattr(base, method, None)) for base in owner.__mro__[1:-1])


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_public_code_has_docstrings(path):
    """Habit 7."""
    assert ast.get_docstring(ast.parse(path.read_text())), "the module"
    assert [name for name, node in public_definitions(path) if not has_docstring(path, name, node)] == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_function_is_fully_annotated(path):
    """Habit 7, for private ones too."""
    bare = []
    tree = ast.parse(path.read_text())
    methods = {f for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args]
            if node in methods and not any(
                isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list
            ):
                given = given[1:]
            extra = [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            if node.returns is None or any(a.annotation is None for a in [*given, *node.args.kwonlyargs, *extra]):
                bare.append(node.name)
    assert bare == []


def test_the_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


# -- the stub of the native module


STUB_TREE = ast.parse(STUB.read_text())
STUB_CLASSES = [node for node in STUB_TREE.body if isinstance(node, ast.ClassDef)]


def bases(node: ast.ClassDef) -> set[str]:
    """The last parts of the names of a class's bases."""
    return {ast.unparse(base).split(".")[-1] for base in node.bases}


def stub_of(body: list[ast.stmt]) -> dict[str, Any]:
    """name -> parameter names of a function's forms, 'property', or the stub of a class."""
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = stub_of(node.body)
        elif isinstance(node, ast.FunctionDef):
            if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                found[node.name] = "property"
            else:
                names = tuple(a.arg for a in node.args.args if a.arg != "self")
                found[node.name] = found.get(node.name, set()) | {names}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = "property"
    return found


def parameter_names(function: Any) -> set[tuple[str, ...]]:
    """From the signatures in pybind11's docstring: `name(self: T, a: int, b: U) -> V`, or several in a numbered list.

    Forms that differ in types alone count as one.
    """
    lines = str(function.__doc__).strip().splitlines()
    forms = [line for line in lines if re.match(r"\d+\. ", line)] or lines[:1]
    found = set()
    for form in forms:
        inside = form[form.index("(") + 1 : form.rindex(") ->")]
        while (flat := re.sub(r"\[[^\[\]]*\]", "", inside)) != inside:
            inside = flat  # subscripts of types hold commas
        names = [part.split(":")[0].strip() for part in inside.split(",") if part.strip()]
        found.add(tuple(name for name in names if name != "self"))
    return found


def built_of(owner: Any) -> dict[str, Any]:
    """The same of the built module."""
    found: dict[str, Any] = {}
    for name, value in vars(owner).items():
        if name.startswith("_") and name != "__init__":
            continue
        if hasattr(value, "__members__") or (isinstance(value, type) and issubclass(value, Exception)):
            continue  # an enum, compared by its members; an exception has nothing of its own
        if isinstance(value, type):
            found[name] = built_of(value)
        elif isinstance(value, property) or "property" in type(value).__name__:
            found[name] = "property"
        elif name != "__init__" or "wrapper" not in type(value).__name__:  # a class without a constructor
            found[name] = parameter_names(getattr(owner, name))
    return found


def test_the_stub_matches_the_built_module_in_both_directions():
    """Habit 14: names, methods, properties, parameter names and their order."""
    enums_and_errors = {c.name for c in STUB_CLASSES if bases(c) & {"Enum", "RuntimeError"}}
    stub = {name: what for name, what in stub_of(STUB_TREE.body).items() if name not in enums_and_errors}
    built = built_of(_core)
    assert stub.keys() == built.keys()
    for name in stub:
        assert stub[name] == built[name], name


def test_the_enums_of_the_stub_match():
    """Habit 14: members and values."""
    stub = {
        node.name: {a.targets[0].id: a.value.value for a in node.body if isinstance(a, ast.Assign)}  # type: ignore[attr-defined]
        for node in STUB_CLASSES
        if "Enum" in bases(node)
    }
    built = {
        name: {member: int(value) for member, value in enum.__members__.items()}
        for name, enum in vars(_core).items()
        if hasattr(enum, "__members__")
    }
    assert stub == built


def test_the_errors_of_the_stub_match():
    assert _core.CommunicationError.__bases__ == (RuntimeError,)


def test_every_dtype_of_the_core_has_a_torch_dtype():
    from partita.device import kernels

    assert set(kernels.DTYPES.values()) == set(_core.DType.__members__.values())
