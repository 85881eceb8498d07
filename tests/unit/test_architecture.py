"""The import direction and the borders of the source tree: section 2 of the design, promise 5."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from partita.engine import EngineBase
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "partita"

# Lowest first: a module imports only from its own package and from what stands before it.
LAYERS = (
    "_core",
    "files",
    "nn",
    "config",
    "device",
    "comm",
    "units",
    "run",
    "optim",
    "model",
    "data",
    "monitor",
    "step",
    "pipeline",
    "checkpoint",
    "zero",
    "engine",
    "utils",
    "__init__",
    "compat",
    "integrations",
    "cli",
    "__main__",
)
CONFIG_MAY_NOT_IMPORT = ("torch", "numpy", "partita._core", "partita.device.kernels")

MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for folder in ("cpp", "cuda") for p in (ROOT / folder).rglob("*.*"))
FRAMEWORK_HEADER = re.compile(r"torch|ATen|c10|THC?/")
PYTHON_HEADER = re.compile(r"pybind11|Python\.h|numpy")


def dotted(path: Path) -> str:
    """partita.units.layout, or partita.units for a package's __init__."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree; the first one is the module."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports; `from package import module` names the module."""
    module, *_ = found = nodes(path)
    assert isinstance(module, ast.Module)
    for node in module.body if at_import_only else found:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = any(
                    (PACKAGE.parent / full.replace(".", "/")).with_suffix(s).exists() for s in (".py", ".pyi", "")
                )
                yield full if is_module and full.startswith("partita") else str(node.module)


def own_imports(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] == "partita"]


def test_every_module_has_a_place_in_the_order():
    assert {layer(dotted(path)) for path in MODULES} | {"_core"} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_layers_before_its_own(path):
    """Habit 1: the import direction."""
    own = layer(dotted(path))
    for name in own_imports(path):
        imported = layer(name)
        assert imported == own or LAYERS.index(imported) < LAYERS.index(own), (
            f"{dotted(path)} ({own}) imports {name} ({imported}), which comes after it"
        )


def test_there_are_no_import_cycles():
    """Also inside a package, where a module may import its neighbours but not its own __init__."""
    graph = {dotted(path): set(own_imports(path)) - {dotted(path)} for path in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_does_not_import_the_package_that_it_is_in(path):
    package = dotted(path).rpartition(".")[0]
    if path.name != "__init__.py":
        assert package not in own_imports(path)


@pytest.mark.parametrize("path", sorted((PACKAGE / "config").glob("*.py")), ids=dotted)
def test_config_needs_neither_torch_nor_the_native_core(path):
    """A config can be checked on a machine that cannot train."""
    for name in imports(path):
        assert not name.startswith(CONFIG_MAY_NOT_IMPORT), name


def test_the_engine_imports_its_parts_by_their_packages():
    """The engine composes packages; it does not reach into their modules."""
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    for name in own_imports(PACKAGE / "engine" / "engine.py"):
        assert name.count(".") == 1 or name.split(".")[1] not in packages - {"engine"}, name


# -- tensors of our own

# What takes device and dtype from torch's defaults, which are the program's. `*_like` takes both from a tensor, and
# `new_*` from the one that it is called on; `frombuffer` and `from_numpy` are on the host in any case.
FACTORIES = {f"torch.{f.__name__}" for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
FACTORIES |= {f"torch.{name}" for name in ("asarray", "empty_quantized", "from_file", "normal", "vander")}
FACTORIES |= {"torch.fft.fftfreq", "torch.fft.rfftfreq", "torch.nested.nested_tensor", "torch.nested.as_nested_tensor"}
# What has no dtype; the generator's device may come first.
ON_A_DEVICE = {"torch.Generator"}
# What makes tensors in ways that name neither.
REFUSED = re.compile(r"torch\.(\w*Tensor|UntypedStorage|TypedStorage)|nn\.[A-Z]\w*|torch\.nn\.[A-Z]\w*|[a-z]\w*\.new")
NO_TENSORS = {"nn.Parameter", "nn.Module", "nn.ModuleList", "nn.ModuleDict", "nn.Sequential"}


def leaves_to_defaults(text: str) -> list[str]:
    """Calls of torch's factories that name no device or no dtype, and of what takes both from nowhere."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {f"torch.{alias.name}" for alias in node.names}
            found += [f"line {node.lineno}: from torch import {name}" for name in names & (FACTORIES | ON_A_DEVICE)]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        is_short = called in FACTORIES and not given >= {"device", "dtype"}
        is_nowhere = called in ON_A_DEVICE and not node.args and "device" not in given
        if is_short or is_nowhere or (REFUSED.fullmatch(called) and called not in NO_TENSORS):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_tensors_name_their_device_and_dtype(path):
    """F21: torch.set_default_device() and torch.set_default_dtype() are the program's."""
    assert leaves_to_defaults(path.read_text()) == []


def test_the_factories_are_those_of_torch():
    """What torch.set_default_device() changes, as torch lists it."""
    assert {"torch.empty", "torch.full", "torch.as_tensor", "torch.linspace", "torch.eye"} <= FACTORIES
    assert len(FACTORIES) > 30


WRONG = [
    "torch.zeros(3)",
    "torch.tensor(1.0, device=d)",
    "torch.empty(n, dtype=t)",
    "f(torch.randn(3, out=x))",
    "torch.as_tensor(x, device=d)",
    "torch.linspace(0, 1, 3)",
    "torch.Generator().manual_seed(3)",
    "torch.Tensor(3)",
    "torch.LongTensor([1])",
    "x.new(3)",
    "self.layer = nn.Linear(3, 4)",
    "from torch import zeros",
]
RIGHT = [
    "torch.zeros(3, dtype=t, device=d)",
    "torch.empty_like(x)",
    "x.new_zeros(3)",
    "torch.Generator(HOST)",
    "torch.frombuffer(b, dtype=t)",
    "nn.Parameter(x)",
    "from torch import Tensor, nn",
]


@pytest.mark.parametrize("text", WRONG)
def test_tensors_that_name_neither_are_found(text):
    """The rule above finds what it forbids."""
    assert leaves_to_defaults(text)


@pytest.mark.parametrize("text", RIGHT)
def test_what_names_both_is_not(text):
    assert leaves_to_defaults(text) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_addresses_of_tensors_are_taken_in_one_place(path):
    """F20: `kernels.address` looks whether there is memory. What compares addresses only is named here."""
    if dotted(path) not in ("partita.device.kernels", "partita.units.residence.always"):
        assert ".data_ptr(" not in path.read_text()


# -- the inside of an engine

INSIDE = ROOT / "tests" / "harness" / "inside.py"
USERS = sorted(path for folder in ("tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(node: ast.Attribute) -> bool:
    """Whether this is an attribute of `self` or `cls`."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@cache
def privates_of_the_engine() -> frozenset[str]:
    """Private attributes and methods of all classes in partita.engine."""
    found = set()
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
                found.add(node.attr)
    return frozenset(name for name in found if is_private(name))


def looks_inside(path: Path, privates: frozenset[str]) -> list[str]:
    """Lines that touch a private of the engine, or a module that the engine's package keeps to itself."""
    touched = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in privates and not is_own(node)
    ]
    return touched + [name for name in imports(path) if name.startswith("partita.engine.")]


def test_the_engine_has_privates_to_look_for():
    assert len(privates_of_the_engine()) > 5


@pytest.mark.parametrize("path", USERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_looks_into_engines(path):
    """What tests, benchmarks and examples want to know, they ask `tests/harness/inside.py`."""
    if path != INSIDE:
        assert looks_inside(path, privates_of_the_engine()) == []


def test_the_one_file_is_seen_to_look_inside():
    """The rule above finds what it forbids."""
    assert looks_inside(INSIDE, privates_of_the_engine())


# -- native sources


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_there_are_native_sources_to_look_at():
    assert len(NATIVE) > 20


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_code_includes_no_header_of_torch(path):
    """Promise 5: one build serves every torch version."""
    assert [name for name in includes(path) if FRAMEWORK_HEADER.match(name)] == []


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_bindings_know_python(path):
    """Promise 5: the core sees pointers, element counts and dtypes."""
    if "bindings" not in path.parts:
        assert [name for name in includes(path) if PYTHON_HEADER.match(name)] == []
        assert not re.search(r"\bpybind11\b|\bPyObject\b", path.read_text())


def test_the_build_links_nothing_of_torch():
    """Promise 5."""
    assert not re.search(r"find_package\(Torch|TORCH_|libtorch", (ROOT / "CMakeLists.txt").read_text())


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_callers_do_not_know_whether_there_is_cuda(path):
    """Section 2: one of cuda/*.cu and cuda/no_cuda.cpp is linked; no #ifdef chooses."""
    if path.suffix in (".cu", ".cuh"):
        return
    conditions = re.findall(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*", path.read_text(), re.MULTILINE)
    assert [line for line in conditions if re.search(r"CUDA|NVCC|GPU", line)] == []


def test_both_forms_of_the_cuda_switch_define_the_same_functions():
    """A function that only one form has fails to link on the other kind of machine."""

    def defined(paths: list[Path]) -> set[str]:
        return {
            m
            for p in paths
            for m in re.findall(r"^\w[\w:<>*& ]*?[ *&](\w+)\([^;]*\)\s*\{", p.read_text(), re.MULTILINE)
        }

    declared = set(re.findall(r"(\w+)\(.*?\);", (ROOT / "cpp/include/partita/cuda_device.h").read_text(), re.DOTALL))
    assert declared <= defined([ROOT / "cuda/no_cuda.cpp"])
    assert declared <= defined(sorted((ROOT / "cuda").glob("*.cu")))


# -- budgets

MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_CONSTRUCTOR, MAX_PARAMETERS = 400, 300, 60, 45, 8
# DeepSpeed's names, all of them: a config or a call that has them must find them.
WIDE_CONSTRUCTORS = {"DeepSpeedCPUAdam", "FusedAdam", "Init", "OneCycle", "PipelineModule"}


def over_budget(path: Path) -> Iterator[str]:
    """What is too large in a source file. `self` is no parameter."""
    text = path.read_text()
    if text.count("\n") > MAX_FILE:
        yield f"{path.name} has {text.count(chr(10))} lines"
    for owner in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef | ast.Module)]:
        is_class = isinstance(owner, ast.ClassDef)
        if is_class and lines_of(owner) > MAX_CLASS:
            yield f"class {owner.name} has {lines_of(owner)} lines"
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            constructs = is_class and node.name == "__init__"
            name = f"{owner.name}.{node.name}" if is_class else node.name
            if lines_of(node) > (MAX_CONSTRUCTOR if constructs else MAX_FUNCTION):
                yield f"{name} has {lines_of(node)} lines"
            parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - is_class
            if constructs and parameters > MAX_PARAMETERS and owner.name not in WIDE_CONSTRUCTORS:
                yield f"{name} has {parameters} parameters"


def lines_of(node: ast.ClassDef | ast.FunctionDef) -> int:
    """From its first line to its last, decorators not counted."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_sources_are_within_budget(path):
    """Files, classes, functions and constructors that a reader can hold."""
    assert list(over_budget(path)) == []


TESTS = sorted(p for folder in ("tests", "bench", "examples") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_tests_are_within_budget(path):
    assert path.read_text().count("\n") <= MAX_FILE


# -- engines are siblings


def test_a_kind_of_engine_adds_and_never_overrides():
    """Each engine adds its calls to `EngineBase`; what the base says is true of every engine."""
    kinds = EngineBase.__subclasses__()
    assert kinds
    for kind in kinds:
        assert kind.__bases__ == (EngineBase,), "a kind of engine is no other kind"
        own = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property)}
        assert own & set(vars(EngineBase)) <= {"__init__", "__doc__"}, kind.__name__
